"""Pieces: what a rank works on, of a row of documents whose tokens lie on several ranks.

A rank's tokens get what windows that end in them, or shortly before them, spill. So for each of its chunks of each document it
has a piece, which is wide enough to hold all these windows. To the steps pieces are documents: they begin with a window of the
document, or with the chunk where the document goes in whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from megatron_lighthouse.lighthouse.packed.maps import Maps
from megatron_lighthouse.lighthouse.packed.packing import Packing, bounds_of, integers
from megatron_lighthouse.sequence.documents import repeated, runs
from megatron_lighthouse.sequence.layout import Layout


@dataclass(frozen=True)
class Pieces(Packing):
    """A packing of pieces. They have no tiles, and no rows of their own: what is made of these is not read."""

    given: tuple[int, ...]
    """Coarsest windows of each piece."""

    @cached_property
    def counts(self) -> Tensor:
        windows = integers([self.given])
        return torch.cat([windows, windows.new_zeros(4, len(self.given))])


@dataclass(frozen=True, eq=False)
class Cut:
    """The pieces of a rank. What each is, is found on the CPU; what their tokens and windows are, where the row is (`on`)."""

    pieces: Pieces
    maps: Maps
    """Of the row."""
    document: Tensor
    """[pieces] int64: that each is of."""
    chunk: Tensor
    """[pieces] int64: that each is for."""
    begin: Tensor
    """[pieces] int64: the first token of the chunk, counted in the document."""
    edges: Tensor
    """[6, pieces] int64, likewise: where a piece starts; the first and the end of the windows that its rank owns by way of it,
    which end in the chunk; the first of the chunk's tokens in no window; where chunk and piece end."""
    windows: Tensor
    """[3, pieces] int64: of each, the windows before those that its rank owns by way of it; these; and those after."""
    tokens: int
    """t / C, in the chunks."""
    owned: int
    """Windows that the rank owns."""

    @staticmethod
    def of(here: Packing, sizes: Tensor, layout: Layout) -> Cut:
        """Those of the chunks of a rank that have tokens: first the early ones of all documents, then the late ones.

        Args:
            here: the packing, on the CPU.
            sizes: [2C, n], tokens of each chunk of each document.
        """
        maps, width, own = Maps.of(here), here.rule.window, layout.chunks
        windows, begins = maps.windows.diff(), sizes.cumsum(0) - sizes
        first, size = (torch.cat([x[chunk] for chunk in own]) for x in (begins, sizes))
        there = size.nonzero().squeeze(1)
        first, size = first[there], size[there]
        document, chunk = there % len(windows), integers(own)[there // len(windows)]
        end, inside = first + size, windows[document] * width
        # from the window that spills into the first token to the one that holds the last
        start = (((first + 1) // width - 1).clamp(min=0) * width).where(inside > 0, first)
        stop = end.where(end > inside, torch.minimum(inside, -(-end // width) * width))
        held = ((torch.minimum(stop, inside) - start) // width).where(inside > 0, 0)
        before, until = (torch.minimum(x // width * width, inside).where(inside > 0, first) for x in (first, end))
        edges = torch.stack([start, before, until, torch.maximum(first, torch.minimum(inside, end)), end, stop])
        owned = torch.stack([before - start, until - before, held * width + start - until]) // width
        lengths, windows_held = (tuple(x.tolist()) for x in (stop - start, held))
        made = (sum(lengths), here.levels, here.pooling, here.rule, lengths)
        pieces = Pieces(*made, bounds_of(stop - start), windows_held)
        return Cut(pieces, maps, document, chunk, first, edges, owned, int(size.sum()), int(owned[1].sum()))

    def on(self, packing: Packing) -> Cut:
        """The same, where the row is."""
        device = packing.cu_seqlens.device
        if device.type == "cpu":
            return self
        table = torch.cat([torch.stack([self.document, self.chunk, self.begin]), self.edges, self.windows])
        table = table.to(device, non_blocking=True)
        pieces = replace(self.pieces, cu_seqlens=self.pieces.cu_seqlens.to(device, non_blocking=True))
        document, chunk, begin = table[:3]
        found = {"document": document, "chunk": chunk, "begin": begin, "edges": table[3:9], "windows": table[9:]}
        return replace(self, pieces=pieces, maps=Maps.of(packing), **found)

    @cached_property
    def bounds(self) -> Tensor:
        """[pieces + 1] int64: tokens before each piece."""
        return self.pieces.cu_seqlens.long()

    @cached_property
    def token_at(self) -> Tensor:
        """[tokens of the pieces] int64: in the row."""
        return runs(self.maps.tokens[self.document] + self.edges[0], self.bounds, self.pieces.seq_length)

    @cached_property
    def token_chunk(self) -> Tensor:
        """[tokens of the pieces] int16: the chunk that their piece is for."""
        return repeated(self.chunk.short(), self.bounds.diff(), self.pieces.seq_length)

    @cached_property
    def own_at(self) -> Tensor:
        """[t / C] int64: the tokens of these chunks; others belong to windows that reach into one, or spill."""
        begins = self.bounds[:-1] + self.begin - self.edges[0]
        return runs(begins, bounds_of(self.edges[4] - self.begin).long(), self.tokens)

    @cached_property
    def owns_token(self) -> Tensor:
        """[tokens of the pieces]: whether this rank pools or keeps them, by way of this piece."""
        return self._every_other(self.edges.diff(dim=0), self.pieces.seq_length)

    @cached_property
    def owns_window(self) -> Tensor:
        """[windows of the pieces]: whether this rank owns them likewise."""
        return self._every_other(self.windows, sum(self.pieces.given))

    @staticmethod
    def _every_other(sizes: Tensor, length: int) -> Tensor:
        """[length] bool, of [runs, pieces]: the second and the fourth run of each piece."""
        owns = torch.arange(sizes.numel(), device=sizes.device) % len(sizes) % 2 == 1
        return repeated(owns, sizes.t().flatten(), length)

    @cached_property
    def window_at(self) -> Tensor:
        """[windows of the pieces] int64: in the row."""
        first = self.maps.windows[self.document] + self.edges[0] // self.pieces.rule.window
        return runs(first, self.pieces.bounds[1].long(), sum(self.pieces.given))

    @cached_property
    def window_chunk(self) -> Tensor:
        """[windows of the pieces] int16: the chunk that their piece is for."""
        return repeated(self.chunk.short(), self.windows.sum(0), sum(self.pieces.given))

    @cached_property
    def own_window(self) -> Tensor:
        """[own] int64: the windows that this rank owns, among those of the pieces."""
        return runs(self.pieces.bounds[1][:-1] + self.windows[0], self._owned, self.owned)

    @cached_property
    def own_window_at(self) -> Tensor:
        """[own] int64: these, in the row."""
        first = self.maps.windows[self.document] + self.edges[1] // self.pieces.rule.window
        return runs(first, self._owned, self.owned)

    @cached_property
    def _owned(self) -> Tensor:
        """[pieces + 1] int64: windows that this rank owns, before each piece."""
        return bounds_of(self.windows[1]).long()
