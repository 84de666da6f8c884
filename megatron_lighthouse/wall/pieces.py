"""Which tokens a token sees, runs of pieces, and which of them meet. Integers alone."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_lighthouse.context_parallel.parts import Mask
from megatron_lighthouse.wall.cut import Cut, Piece


@dataclass(frozen=True)
class Sight:
    """Which tokens of the whole sequence a token sees, besides that it sees none after itself."""

    bounds: tuple[int, ...] = ()
    """Where each document begins, and the last ends: a token sees its own. Empty: there is one."""
    window: int | None = None
    """Tokens that a token sees, itself among them; None: all."""

    def first(self, tokens: Tensor) -> Tensor:
        """The first token that each of `tokens` sees."""
        first = torch.zeros_like(tokens)
        if self.bounds:
            bounds = torch.tensor(self.bounds, device=tokens.device)
            first = bounds[torch.searchsorted(bounds, tokens, right=True) - 1]
        return first if self.window is None else torch.maximum(first, tokens - self.window + 1)

    def before(self, piece: Piece) -> tuple[int, int]:
        """(first, end): what of `piece` sees tokens before it is its tokens up to `end`, and those from `first` on."""
        first, end = 0, piece.end
        if self.bounds:
            following = bisect_right(self.bounds, piece.begin)
            first, end = self.bounds[following - 1], min(end, self.bounds[following])
        if self.window is not None:
            first, end = max(first, piece.begin - self.window + 1), min(end, piece.begin + self.window - 1)
        return min(first, piece.begin), end


class Run(NamedTuple):
    """Pieces that follow each other in the sequence and in a tensor, all but the last as long."""

    number: int
    """Of the first."""
    pieces: int
    rows: slice
    """Of the tensor."""
    taken: slice
    """Of the rows of all runs, one after the other."""
    step: int
    """Rows of a piece."""

    @property
    def lengths(self) -> list[int]:
        """Of each piece."""
        return [self.step] * (self.pieces - 1) + [self.rows.stop - self.rows.start - (self.pieces - 1) * self.step]

    def joins(self, piece: Piece) -> bool:
        """Whether the piece can be its next."""
        follows = (self.number + self.pieces, self.rows.stop) == (piece.number, piece.rows.start)
        return follows and self.lengths[-1] == self.step >= piece.rows.stop - piece.rows.start


def runs(pieces: Sequence[Piece]) -> list[Run]:
    """The rows of pieces, joined where they can be."""
    found: list[Run] = []
    taken = 0
    for piece in pieces:
        length = piece.rows.stop - piece.rows.start
        run = Run(piece.number, 0, slice(piece.rows.start, 0), slice(taken, 0), length)
        if found and found[-1].joins(piece):
            run = found.pop()
        taken += length
        rows, own = slice(run.rows.start, piece.rows.stop), slice(run.taken.start, taken)
        found.append(run._replace(pieces=run.pieces + 1, rows=rows, taken=own))
    return found


class Meeting(NamedTuple):
    """Near rows that have an anchor of their own, and the far rows before it that they see."""

    near: Piece
    taken: slice
    """Of the near rows of all meetings, one after the other."""
    seen: list[Piece]
    far: list[Run]
    """The same."""


@lru_cache(64)
def meetings(cut: Cut, sight: Sight, mask: Mask) -> tuple[Meeting, ...]:
    """In the order of near rows. They have an anchor before each chunk; what they see of their own is not meant."""
    found, taken = [], 0
    theirs = cut.pieces(mask.far)
    for group in cut.whole(mask.near):
        first, end = sight.before(group)
        seen = [piece.since(first) for piece in theirs if piece.number < group.number and piece.end > first]
        length = end - group.begin
        if seen and length > 0:
            near = Piece(group.number, group.begin, slice(group.rows.start, group.rows.start + length))
            found.append(Meeting(near, slice(taken, taken + length), seen, runs(seen)))
            taken += length
    return tuple(found)


def first_rows(cut: Cut, sight: Sight, chunks: Sequence[int], device: torch.device) -> Tensor:
    """[n] int32: the first row of its own piece that each row of these chunks sees; see `Diagonal`."""
    found = []
    for piece in cut.pieces(chunks):
        tokens = torch.arange(piece.begin, piece.end, device=device)
        found.append(sight.first(tokens).clamp(min=piece.begin) - piece.begin + piece.rows.start)
    return torch.cat(found).int()
