"""Shares: which rank does what for a row of documents whose tokens lie on several ranks, in document zigzag. Integers alone.

A chunk of a document may end within a window. So a window has one owner (ours): the rank of the chunk that its last token is
in. To it the tokens of the window before the chunk travel, and it pools them as one rank would. Tokens in no window, and
documents that go in whole, stay where they are.

Of the entries of a rank's pieces (`packed.pieces`) those that it does not own are not gathered, and those that spill into no
token of a piece's chunk are not scattered.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.context_parallel.transfer import End
from megatron_lighthouse.lighthouse.packed.align import arriving, leaving
from megatron_lighthouse.lighthouse.packed.maps import Maps
from megatron_lighthouse.lighthouse.packed.packing import Packing, bounds_of, integers, numbered
from megatron_lighthouse.lighthouse.packed.pieces import Cut
from megatron_lighthouse.lighthouse.packed.steps import Runs
from megatron_lighthouse.sequence.documents import Documents, repeated, runs
from megatron_lighthouse.sequence.layout import Layout


class Shares:
    """Those of one packing and rank. Made on the CPU; what the steps read is on the device of the row."""

    def __init__(self, packing: Packing, layout: Layout) -> None:
        self.packing, self.layout = packing, layout
        self.here = here = packing.here
        self.window, documents = packing.rule.window, Documents(here.cu_seqlens, here.lengths)
        self.sizes = documents.chunk_sizes(layout.size)
        """[2C, n]: tokens of each chunk of each document."""
        self.chunk = _chunks(self.sizes)
        """[t] int16: in which each token is."""
        self.owner = self.chunk.index_select(0, Maps.of(here).last(self.window))
        """[W] int16: the chunk whose rank owns each coarsest window."""
        self.own_tokens = documents.rows_of_rank(layout)
        self.cut = Cut.of(here, self.sizes, layout)
        self.pieces = self.cut.pieces_on(packing.cu_seqlens.device)

    @staticmethod
    def of(packing: Packing, layout: Layout) -> Shares:
        """Those of a packing; made once for all layers."""
        made: dict[Layout, Shares] = vars(packing).setdefault("shares", {})
        if layout not in made:
            made[layout] = Shares(packing, layout)
        return made[layout]

    def _by_entry(self, tokens: Tensor, windows: Tensor) -> Tensor:
        """[..., entries of all levels], from what tokens and coarsest windows have."""
        pooling, top = self.packing.pooling, self.packing.levels - 1
        return torch.cat(
            [tokens, *(windows.repeat_interleave(pooling ** (top - level), -1) for level in range(1, top + 1))], -1
        )

    def _on_device(self, x: Tensor) -> Tensor:
        return x.to(self.packing.cu_seqlens.device, non_blocking=True)

    def _rank(self, chunk: Tensor) -> Tensor:
        return torch.minimum(chunk, 2 * self.layout.size - 1 - chunk)

    @cached_property
    def token_owner(self) -> Tensor:
        """[t]: the rank that pools each token, or keeps it where it is in no window."""
        owner = self._rank(self.owner).repeat_interleave(self.window)
        return self._rank(self.chunk).scatter_(0, Maps.of(self.here).inside, owner)

    @cached_property
    def align(self) -> tuple[End, End]:
        """Tokens as this rank holds them, and tokens of its pieces: those that it owns travel there."""
        ends = leaving(self.cut, self.owner, self.layout), arriving(self.cut, self.sizes, self.layout)
        here, there = (End(self._on_device(rows), counts, length) for rows, counts, length in ends)
        return here, there

    @cached_property
    def own_at(self) -> Tensor:
        """[t / C]: this rank's tokens, as it holds them, among those of its pieces."""
        return self._on_device(self.cut.own_at)

    @cached_property
    def entry_at(self) -> Tensor:
        """[entries of the pieces]: in the row's pyramid."""
        finer, levels = self.packing.rule.window, [self.cut.token_at]
        for level in range(1, self.packing.levels):
            each = finer // self.packing.window(level)
            entries = (self.cut.window_at.unsqueeze(1) * each + torch.arange(each)).flatten()
            levels.append(entries + self.packing.offset(level))
        return self._on_device(torch.cat(levels))

    @cached_property
    def owns(self) -> Tensor:
        """[entries of the pieces]: whether this rank gathers them, by way of this piece."""
        return self._on_device(self._by_entry(self.cut.owns_token, self.cut.owns_window))

    @cached_property
    def owners(self) -> Tensor:
        """[entries of the row]: the rank that gathers each."""
        return self._on_device(self._by_entry(self.token_owner, self._rank(self.owner)))

    @cached_property
    def chunks_at(self) -> Tensor:
        """[entries of the pieces]: the chunk that their piece is for."""
        return self._on_device(self._by_entry(self.cut.token_chunk, self.cut.window_chunk))

    @cached_property
    def spilled(self) -> tuple[Tensor, Tensor]:
        """[entries of the row] int16, on the CPU: the first and the last chunk that each spills into."""
        maps, packing = Maps.of(self.here), self.here
        first, last, final = [self.chunk], [self.chunk], (maps.tokens[1:] - 1)[maps.window_document]
        for level in range(1, packing.levels):
            width = packing.window(level)
            begin = maps.last(width)
            end = torch.minimum(begin + (width - 1), final.repeat_interleave(self.window // width))
            first.append(self.chunk.index_select(0, begin))
            last.append(self.chunk.index_select(0, end))
        return torch.cat(first), torch.cat(last)

    @cached_property
    def wanted(self) -> Tensor:
        """[copies, entries of the row] int16: the chunks, one after the other, that each spills into; -1 where there are no
        more, or where the document has no token in the chunk."""
        first, last = self.spilled
        document = self._by_entry(torch.empty(0, dtype=torch.int64), Maps.of(self.here).window_document)
        spread = (last - first)[self.here.seq_length :].long()
        # one for each further chunk of each entry
        bounds = bounds_of(spread).long()
        further = int(bounds[-1])
        copy, some = runs(torch.ones_like(spread), bounds, further), numbered(bounds, further)
        at = some + self.here.seq_length
        chunk = first.index_select(0, at) + copy
        there = self.sizes[chunk, document.index_select(0, some)] > 0
        wanted = torch.full((1 + int(copy.max()) if further else 1, len(first)), -1, dtype=torch.int16)
        wanted[0] = first
        wanted.view(-1).scatter_(0, copy * len(first) + at, chunk.where(there, -1).to(torch.int16))
        return self._on_device(wanted)

    @cached_property
    def wants(self) -> Tensor:
        """[entries of the pieces]: whether they spill into the piece's chunk."""
        first, last = (self._on_device(x).index_select(0, self.entry_at) for x in self.spilled)
        return (first <= self.chunks_at) & (self.chunks_at <= last)

    @cached_property
    def rows(self) -> Documents:
        """The gathered rows of all documents, filled up to a number that 2C divides: as ranks attend to them."""
        lengths = self.packing.rows.lengths
        filler = -sum(lengths) % (2 * self.layout.size)
        lengths = (*lengths, filler) if filler else lengths
        return Documents(self._on_device(bounds_of(integers(lengths))), lengths)

    @cached_property
    def _rows_here(self) -> Documents:
        """Those, on the CPU."""
        return Documents(bounds_of(integers(self.rows.lengths)), self.rows.lengths)

    @cached_property
    def row_rank(self) -> Tensor:
        """[S filled up]: the rank that attends to each row."""
        return self._on_device(self._rank(_chunks(self._rows_here.chunk_sizes(self.layout.size))))

    @cached_property
    def own_rows(self) -> Tensor:
        """[S filled up / C]: the rows that this rank attends to."""
        return self._on_device(self._rows_here.rows_of_rank(self.layout))

    @cached_property
    def own_windows(self) -> Tensor:
        """[own]: the windows that this rank owns, among those of its pieces."""
        return self._on_device(self.cut.owns_window.nonzero().squeeze(1))

    @cached_property
    def own_inside(self) -> Tensor:
        """[own * F]: the tokens of the windows that this rank owns, among those of its pieces."""
        return Maps.of(self.pieces).inside.view(-1, self.window)[self.own_windows].flatten()

    @cached_property
    def most_windows(self) -> int:
        """That any rank owns."""
        return int(self._rank(self.owner).bincount(minlength=self.layout.size).max())

    @cached_property
    def window_places(self) -> Tensor:
        """[W]: where each window is among those of all ranks, `most_windows` of each."""
        rank = self._rank(self.owner).long()
        order = ((rank * 2 * self.layout.size + self.owner) * len(rank) + torch.arange(len(rank))).argsort()
        counts = rank.bincount(minlength=self.layout.size)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(rank)) - (counts.cumsum(0) - counts)[rank[order]]
        return self._on_device(place + rank * self.most_windows)

    @cached_property
    def own_window_at(self) -> Tensor:
        """[own]: the windows that this rank owns, in the row."""
        return self._on_device(self.cut.window_at[self.cut.owns_window])

    def own_in_row(self, unit: int) -> Tensor:
        """[own * F / unit]: their rows, where all windows have one for every `unit` tokens."""
        each = self.window // unit
        return (self.own_window_at.unsqueeze(1) * each + torch.arange(each, device=self.own_window_at.device)).flatten()

    @cached_property
    def own_runs(self) -> Runs:
        """The windows that this rank owns, as runs of each document's."""
        owned, before = self.cut.window_at[self.cut.owns_window], Maps.of(self.here).windows
        document = torch.searchsorted(before[1:].contiguous(), owned, right=True)
        begins = torch.ones_like(owned, dtype=torch.bool)
        begins[1:] = (owned.diff() != 1) | (document.diff() != 0)
        at = begins.nonzero().squeeze(1)
        ends = torch.cat([at[1:], at.new_tensor([len(owned)])[: len(at)]])
        first, size = (owned - before[document])[at], ends - at
        return tuple(zip(document[at].tolist(), first.tolist(), (first + size).tolist(), strict=True))

    def whole_tokens(self, x: Tensor, exchange: Exchange, purpose: str) -> Tensor:
        """[tokens of the pieces, ...] -> [t, ...] of the row: those in windows; others are zero."""
        inside = Maps.of(self.packing).inside
        out = x.new_zeros(self.packing.seq_length, *x.shape[1:])
        out[inside] = self.whole(x[self.own_inside].unflatten(0, (-1, self.window)), exchange, purpose).flatten(0, 1)
        return out

    def own_scores(self, scores: Tensor) -> Tensor:
        """[2, 1, G, coarse length] of the windows that this rank owns, from those of its pieces."""
        pooling, top = self.packing.pooling, self.packing.levels - 1
        each = [pooling ** (top - level) for level in range(1, top + 1)]
        levels = scores.split([len(self.cut.window_at) * n for n in each], -1)
        own = (x.unflatten(-1, (-1, n))[..., self.own_windows, :] for x, n in zip(levels, each, strict=True))
        return torch.cat([x.flatten(3) for x in own], -1)

    def whole(self, x: Tensor, exchange: Exchange, purpose: str) -> Tensor:
        """[own, ...] of the windows that each rank owns -> [W, ...] of all, in order."""
        filled = torch.cat([x, x.new_zeros(self.most_windows - len(x), *x.shape[1:])])
        return exchange.all_gather(filled, purpose).flatten(0, 1)[self.window_places]

    def whole_scores(self, scores: Tensor, exchange: Exchange) -> Tensor:
        """[2, 1, G, coarse length] of the row, from those of the windows that each rank owns; all in one message."""
        pooling, top = self.packing.pooling, self.packing.levels - 1
        each = [pooling ** (top - level) for level in range(1, top + 1)]
        levels = scores.split([len(self.own_windows) * n for n in each], -1)
        trees = torch.cat([x.unflatten(-1, (-1, n)) for x, n in zip(levels, each, strict=True)], -1)
        whole = self.whole(trees.movedim(3, 0), exchange, "select").movedim(0, 3)
        return torch.cat([x.flatten(3) for x in whole.split(each, -1)], -1)


def _chunks(sizes: Tensor) -> Tensor:
    """[length] int16: the chunk in which each place of a row is, of the [2C, n] sizes of each document's."""
    chunks, documents = sizes.shape
    numbers = torch.arange(chunks, dtype=torch.int16).repeat(documents)
    return repeated(numbers, sizes.t().flatten(), int(sizes.sum()))
