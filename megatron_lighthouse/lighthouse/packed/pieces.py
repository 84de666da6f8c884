"""Pieces: what a rank works on, of a row of documents whose tokens lie on several ranks.

A rank's tokens get what windows that end in them, or shortly before them, spill. So for each of its chunks of each document it
has a piece, which is wide enough to hold all these windows. To the steps pieces are documents: they begin with a window of the
document, or with the chunk where the document goes in whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from megatron_lighthouse.lighthouse.packed.maps import Maps
from megatron_lighthouse.lighthouse.packed.packing import Packing, numbered
from megatron_lighthouse.sequence.layout import Layout


@dataclass(frozen=True)
class Pieces(Packing):
    """A packing of pieces. They have no tiles, and no rows of their own: `tiles` and what is made of these is not read."""

    given: tuple[int, ...]
    """Coarsest windows of each piece."""

    @cached_property
    def windows(self) -> tuple[int, ...]:
        return self.given


@dataclass(frozen=True, eq=False)
class Cut:
    """The pieces of a rank, and what their tokens and windows are; on the CPU but for `pieces`."""

    pieces: Pieces
    token_at: Tensor
    """[tokens of the pieces] int64: in the row."""
    token_chunk: Tensor
    """[tokens of the pieces]: the chunk that their piece is for."""
    in_chunk: Tensor
    """[tokens of the pieces]: whether they are of that chunk; others belong to windows that reach into it, or spill."""
    loose: Tensor
    """[tokens of the pieces]: whether they are in no window."""
    inside: Tensor
    """[windows of the pieces * F]: the tokens of the windows."""
    window_at: Tensor
    """[windows of the pieces]: in the row."""
    window_chunk: Tensor
    """[windows of the pieces]: the chunk that their piece is for."""

    @staticmethod
    def of(here: Packing, sizes: Tensor, layout: Layout, device: torch.device) -> Cut:
        """Those of the chunks of a rank that have tokens: first the early ones of all documents, then the late ones.

        Args:
            here: the packing, on the CPU.
            sizes: [2C, n], tokens of each chunk of each document.
            device: of the pieces.
        """
        maps, width, own = Maps.of(here), here.rule.window, layout.chunks
        windows, begins = maps.windows.diff(), sizes.cumsum(0) - sizes
        first, size = (torch.cat([x[chunk] for chunk in own]) for x in (begins, sizes))
        end, inside = first + size, (windows * width).repeat(2)
        # from the window that spills into the first token to the one that holds the last; counted in the document
        start = (((first + 1) // width - 1).clamp(min=0) * width).where(inside > 0, first)
        stop = end.where(end > inside, torch.minimum(inside, -(-end // width) * width))
        held = ((torch.minimum(stop, inside) - start) // width).where(inside > 0, 0)
        first, end, start, stop, held = (x[size > 0] for x in (first, end, start, stop, held))
        document = torch.arange(len(windows)).repeat(2)[size > 0]
        chunk = torch.tensor(own).repeat_interleave(len(windows))[size > 0]

        lengths: tuple[int, ...] = tuple((stop - start).tolist())
        bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        made = (sum(lengths), here.levels, here.pooling, here.rule, lengths)
        pieces = Pieces(*made, bounds, tuple(held.tolist()))
        piece = numbered(bounds, pieces.seq_length)
        position = torch.arange(pieces.seq_length) - bounds[piece] + start[piece]
        before = pieces.bounds[1].long()
        of = numbered(before, sum(pieces.given))
        return Cut(
            Pieces(*made, bounds.to(device, non_blocking=True), pieces.given),
            maps.tokens[document][piece] + position,
            chunk[piece],
            (position >= first[piece]) & (position < end[piece]),
            position >= (windows * width)[document][piece],
            Maps.of(pieces).inside,
            (maps.windows[document] + start // width - before[:-1])[of] + torch.arange(len(of)),
            chunk[of],
        )
