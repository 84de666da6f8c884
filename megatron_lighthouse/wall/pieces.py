"""Pieces of a sequence, each with an anchor before and after it; and which tokens a token sees. Integers alone."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens, of which a tensor holds the rows."""

    number: int
    """Of the whole sequence's, in order."""
    begin: int
    """Its first token in the sequence."""
    rows: slice
    """Of the tensor."""

    @property
    def end(self) -> int:
        """The token after its last."""
        return self.begin + self.rows.stop - self.rows.start


@dataclass(frozen=True)
class Cut:
    """How a sequence is cut: into chunks for the ranks, and these into pieces of `step` tokens, the last may be shorter."""

    chunk: int
    """Tokens of a chunk."""
    step: int

    @property
    def per_chunk(self) -> int:
        return -(-self.chunk // self.step)

    def pieces(self, chunks: Sequence[int]) -> list[Piece]:
        """Those of tensors that hold these chunks, one after the other."""
        found = []
        for i, chunk in enumerate(chunks):
            for j in range(self.per_chunk):
                begin, end = j * self.step, min((j + 1) * self.step, self.chunk)
                rows = slice(i * self.chunk + begin, i * self.chunk + end)
                found.append(Piece(chunk * self.per_chunk + j, chunk * self.chunk + begin, rows))
        return found

    def whole(self, chunks: Sequence[int]) -> list[Piece]:
        """These chunks, each as one piece that bears the number of its first."""
        starts = [slice(i * self.chunk, (i + 1) * self.chunk) for i in range(len(chunks))]
        return [Piece(chunk * self.per_chunk, chunk * self.chunk, rows) for chunk, rows in zip(chunks, starts, strict=True)]


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
    """Pieces whose rows follow each other, all but the last as long."""

    rows: slice
    """Of the tensor."""
    taken: slice
    """Of the rows of all runs, one after the other."""
    pieces: slice
    """Of all pieces, in order."""
    step: int
    """Rows of a piece."""


def runs(seen: Sequence[slice]) -> list[Run]:
    """The rows of pieces, joined where they can be."""
    found: list[Run] = []
    taken = 0
    for i, rows in enumerate(seen):
        length = rows.stop - rows.start
        begin, first, run = rows.start, taken, Run(rows, slice(0), slice(i, i), length)
        if found:
            last = found[-1]
            full = last.rows.stop - last.rows.start == (last.pieces.stop - last.pieces.start) * last.step
            if full and last.rows.stop == rows.start and length <= last.step:
                run = found.pop()
                begin, first = run.rows.start, run.taken.start
        taken += length
        found.append(Run(slice(begin, rows.stop), slice(first, taken), slice(run.pieces.start, i + 1), run.step))
    return found


def first_rows(cut: Cut, sight: Sight, chunks: Sequence[int], device: torch.device) -> Tensor:
    """[n] int32: the first row of its own piece that each row of these chunks sees; see `Diagonal`."""
    found = []
    for piece in cut.pieces(chunks):
        tokens = torch.arange(piece.begin, piece.end, device=device)
        found.append(sight.first(tokens).clamp(min=piece.begin) - piece.begin + piece.rows.start)
    return torch.cat(found).int()
