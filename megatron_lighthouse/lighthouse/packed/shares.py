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
from megatron_lighthouse.context_parallel.transfer import Between
from megatron_lighthouse.lighthouse.packed.align import arriving, leaving
from megatron_lighthouse.lighthouse.packed.maps import Maps
from megatron_lighthouse.lighthouse.packed.packing import Packing, bounds_of, integers
from megatron_lighthouse.lighthouse.packed.pieces import Cut
from megatron_lighthouse.lighthouse.packed.steps import Runs
from megatron_lighthouse.sequence.documents import Documents, repeated, runs
from megatron_lighthouse.sequence.layout import Layout


class Shares:
    """Those of one packing and rank. Of documents and their chunks the host counts what there is, on the CPU. Tables of tokens
    and entries are made on the device of the row, which is asked nothing."""

    def __init__(self, packing: Packing, layout: Layout) -> None:
        self.packing, self.layout, self.window = packing, layout, packing.rule.window
        self.device = packing.cu_seqlens.device
        here = packing.on_cpu
        self.sizes = Documents(here.cu_seqlens, here.lengths).chunk_sizes(layout.size)
        """[2C, n], on the CPU: tokens of each chunk of each document."""
        self.cut_on_cpu = Cut.of(here, self.sizes, layout)
        """The pieces of this rank, on the CPU."""
        self.cut = self.cut_on_cpu.on(packing)
        self.pieces, self.maps = self.cut.pieces, Maps.of(packing)

    @staticmethod
    def of(packing: Packing, layout: Layout) -> Shares:
        """Those of a packing; made once for all layers."""
        made: dict[Layout, Shares] = vars(packing).setdefault("shares", {})
        if layout not in made:
            made[layout] = Shares(packing, layout)
        return made[layout]

    def _by_entry(self, tokens: Tensor, windows: Tensor) -> Tensor:
        """[..., entries of all levels], from what tokens and coarsest windows have."""
        return torch.cat([tokens, *(windows.repeat_interleave(each, -1) for each in self._each)], -1)

    def _on_device(self, x: Tensor) -> Tensor:
        return x.to(self.device, non_blocking=True)

    def _rank(self, chunk: Tensor) -> Tensor:
        return torch.minimum(chunk, 2 * self.layout.size - 1 - chunk)

    @cached_property
    def _sizes(self) -> Tensor:
        """`sizes`, on the device."""
        return self._on_device(self.sizes)

    @cached_property
    def chunk(self) -> Tensor:
        """[t] int16: in which each token is."""
        return _chunks(self._sizes, self.packing.seq_length)

    @cached_property
    def owner(self) -> Tensor:
        """[W] int16: the chunk whose rank owns each coarsest window."""
        return self.chunk.index_select(0, self.maps.last(self.window))

    @cached_property
    def token_owner(self) -> Tensor:
        """[t]: the rank that pools each token, or keeps it where it is in no window."""
        owner = self._rank(self.owner).repeat_interleave(self.window)
        return self._rank(self.chunk).scatter_(0, self.maps.inside, owner)

    @cached_property
    def align(self) -> Between:
        """From tokens as this rank holds them to tokens of its pieces: those that it owns travel there."""
        given = self.cut_on_cpu, self.sizes, self.layout, self.device
        return Between(leaving(*given), arriving(*given), self.layout.rank)

    @cached_property
    def entry_at(self) -> Tensor:
        """[entries of the pieces]: in the row's pyramid."""
        finer, levels = self.packing.rule.window, [self.cut.token_at]
        for level in range(1, self.packing.levels):
            each = finer // self.packing.window(level)
            entries = (self.cut.window_at.unsqueeze(1) * each + torch.arange(each, device=self.device)).flatten()
            levels.append(entries + self.packing.offset(level))
        return torch.cat(levels)

    @cached_property
    def owns(self) -> Tensor:
        """[entries of the pieces]: whether this rank gathers them, by way of this piece."""
        return self._by_entry(self.cut.owns_token, self.cut.owns_window)

    @cached_property
    def owners(self) -> Tensor:
        """[entries of the row]: the rank that gathers each."""
        return self._by_entry(self.token_owner, self._rank(self.owner))

    @cached_property
    def chunks_at(self) -> Tensor:
        """[entries of the pieces]: the chunk that their piece is for."""
        return self._by_entry(self.cut.token_chunk, self.cut.window_chunk)

    @cached_property
    def spilled(self) -> tuple[Tensor, Tensor]:
        """[entries of the row] int16: the first and the last chunk that each spills into."""
        maps, packing = self.maps, self.packing
        first, last, final = [self.chunk], [self.chunk], (maps.tokens[1:] - 1)[maps.window_document]
        for level in range(1, packing.levels):
            width = packing.window(level)
            begin = maps.last(width)
            end = torch.minimum(begin + (width - 1), final.repeat_interleave(self.window // width))
            first.append(self.chunk.index_select(0, begin))
            last.append(self.chunk.index_select(0, end))
        return torch.cat(first), torch.cat(last)

    @cached_property
    def copies(self) -> int:
        """Chunks that an entry spills into at most: F tokens cross as many ends as chunks of so few tokens can have in them. A
        power of two where there are so many chunks, so that batches have few numbers of them: each compiles kernels."""
        pooled = self.sizes[:, self.packing.counts[0] > 0]
        least, chunks = int(pooled.min()) if pooled.numel() else self.window, len(self.sizes)
        crossed = (self.window - 2) // least + 1 if least else chunks - 1
        return min(1 << crossed.bit_length(), chunks)

    @cached_property
    def wanted(self) -> Tensor:
        """[copies, entries of the row] int16: the chunks, one after the other, that each spills into; -1 where there are no
        more, or where the document has no token in the chunk."""
        first, last = self.spilled
        chunk = first + torch.arange(self.copies, dtype=torch.int16, device=self.device).unsqueeze(1)
        there = chunk <= last
        if not self.sizes.all():
            document = self._by_entry(self.maps.document, self.maps.window_document)
            there &= self._sizes[chunk.clamp(max=len(self.sizes) - 1).long(), document] > 0
        return chunk.where(there, -1)

    @cached_property
    def gathers_at(self) -> Tensor:
        """[entries of the row] int32: which entry of the pieces each is that this rank gathers; -1 of the others."""
        number = torch.arange(len(self.owns), device=self.device)
        return _inverse(self.entry_at.where(self.owns, len(self.owners)), number, len(self.owners))

    @cached_property
    def scatters_at(self) -> Tensor:
        """[2, entries of the row] int32: likewise, of those that this rank scatters over its early and over its late chunk."""
        number, entries = torch.arange(len(self.wants), device=self.device), len(self.owners)
        place = (self.chunks_at >= self.layout.size) * entries + self.entry_at
        return _inverse(place.where(self.wants, 2 * entries), number, 2 * entries).view(2, -1)

    @cached_property
    def wants(self) -> Tensor:
        """[entries of the pieces]: whether they spill into the piece's chunk."""
        first, last = (x.index_select(0, self.entry_at) for x in self.spilled)
        return (first <= self.chunks_at) & (self.chunks_at <= last)

    @cached_property
    def rows(self) -> Documents:
        """The gathered rows of all documents, filled up to a number that 2C divides: as ranks attend to them."""
        lengths = self.packing.rows.lengths
        filler = -sum(lengths) % (2 * self.layout.size)
        lengths = (*lengths, filler) if filler else lengths
        return Documents(self._on_device(bounds_of(integers(lengths))), lengths)

    @cached_property
    def row_at(self) -> Tensor:
        """[S filled up] int32: where each row is among those of all ranks, as they attend to them: first those of rank 0."""
        chunk = _chunks(self.rows.chunk_sizes(self.layout.size), self.rows.tokens)
        order = (2 * self._rank(chunk) + (chunk >= self.layout.size)).sort(stable=True).indices
        return _inverse(order, torch.arange(len(order), device=self.device), len(order))

    @cached_property
    def own_rows(self) -> Tensor:
        """[S filled up / C]: the rows that this rank attends to."""
        return self.rows.rows_of_rank(self.layout)

    @property
    def own_windows(self) -> Tensor:
        """[own]: the windows that this rank owns, among those of its pieces."""
        return self.cut.own_window

    @cached_property
    def own_inside(self) -> Tensor:
        """[own * F]: the tokens of the windows that this rank owns, among those of its pieces."""
        return Maps.of(self.pieces).inside.view(-1, self.window)[self.own_windows].flatten()

    @cached_property
    def _owned(self) -> Tensor:
        """[2C, n], on the CPU: windows of each document that end in each of its chunks."""
        ends = torch.minimum(self.sizes.cumsum(0) // self.window, self.packing.counts[0])
        return ends.diff(dim=0, prepend=torch.zeros_like(ends[:1]))

    @property
    def _of_ranks(self) -> Tensor:
        """[C], on the CPU: windows that each rank owns."""
        each = self._owned.sum(1)
        return (each + each.flip(0))[: self.layout.size]

    @cached_property
    def most_windows(self) -> int:
        """That any rank owns."""
        return int(self._of_ranks.max())

    @cached_property
    def window_places(self) -> Tensor:
        """[W]: where each window is among those of all ranks, `most_windows` of each: those of its early chunks come first."""
        chunk = torch.arange(len(self._owned))
        early = self._owned.sum(1).flip(0).where(chunk >= self.layout.size, 0)
        before = self._owned.cumsum(1) - self._owned + (self._rank(chunk) * self.most_windows + early).unsqueeze(1)
        table = self._on_device(torch.stack([before, self._owned]))
        begins, sizes = (x.t().flatten() for x in table)
        return runs(begins, bounds_of(sizes).long(), sum(self.packing.windows))

    @property
    def own_window_at(self) -> Tensor:
        """[own]: the windows that this rank owns, in the row."""
        return self.cut.own_window_at

    def own_in_row(self, unit: int) -> Tensor:
        """[own * F / unit]: their rows, where all windows have one for every `unit` tokens."""
        each = self.window // unit
        return (self.own_window_at.unsqueeze(1) * each + torch.arange(each, device=self.device)).flatten()

    @cached_property
    def own_runs(self) -> Runs:
        """The windows that this rank owns, as runs of each document's."""
        first, size = self.cut_on_cpu.edges[1] // self.window, self.cut_on_cpu.windows[1]
        of_pieces = torch.stack([self.cut_on_cpu.document, first, first + size])[:, size > 0]
        return tuple(zip(*of_pieces.tolist(), strict=True))

    def whole_tokens(self, x: Tensor, exchange: Exchange, purpose: str) -> Tensor:
        """[tokens of the pieces, ...] -> [t, ...] of the row: those in windows; others are zero."""
        inside = self.maps.inside
        out = x.new_zeros(self.packing.seq_length, *x.shape[1:])
        out[inside] = self.whole(x[self.own_inside].unflatten(0, (-1, self.window)), exchange, purpose).flatten(0, 1)
        return out

    def whole(self, x: Tensor, exchange: Exchange, purpose: str) -> Tensor:
        """[own, ...] of the windows that each rank owns -> [W, ...] of all, in order."""
        filled = torch.cat([x, x.new_zeros(self.most_windows - len(x), *x.shape[1:])])
        return exchange.all_gather(filled, purpose).flatten(0, 1)[self.window_places]

    @cached_property
    def _each(self) -> list[int]:
        """Entries of a coarsest window at levels 1 and up."""
        top = self.packing.levels - 1
        return [self.packing.pooling ** (top - level) for level in range(1, top + 1)]

    def _coarse(self, windows: Tensor, among: Tensor | int, begin: Tensor | int = 0) -> Tensor:
        """The entries of windows at levels 1 and up, level by level, in a list of those of so many, which begins at `begin`."""
        levels, before = [], 0
        for each in self._each:
            first = begin + among * before + windows * each
            levels.append((first.unsqueeze(1) + torch.arange(each, device=self.device)).flatten())
            before += each
        return torch.cat(levels)

    @cached_property
    def _own_coarse(self) -> Tensor:
        """[own coarse length] int64: the entries of the windows that this rank owns, among those of its pieces."""
        return self._coarse(self.own_windows, sum(self.pieces.given))

    @cached_property
    def _whole_coarse(self) -> Tensor:
        """[coarse length] int64: the entries of the row, among those that all ranks send."""
        rank, place = self.window_places // self.most_windows, self.window_places % self.most_windows
        owned = self._on_device(self._of_ranks)
        return self._coarse(place, owned[rank], rank * (self.most_windows * sum(self._each)))

    def own_scores(self, scores: Tensor) -> Tensor:
        """[2, 1, G, coarse length] of the windows that this rank owns, from those of its pieces."""
        return scores.index_select(-1, self._own_coarse)

    def whole_scores(self, scores: Tensor, exchange: Exchange) -> Tensor:
        """[2, 1, G, coarse length] of the row, from those of the windows that each rank owns; all in one message."""
        filler = self.most_windows * sum(self._each) - scores.shape[-1]
        scores = torch.nn.functional.pad(scores, (0, filler)) if filler else scores
        return exchange.all_gather(scores, "select").movedim(0, -2).flatten(-2).index_select(-1, self._whole_coarse)


def _inverse(places: Tensor, numbers: Tensor, length: int) -> Tensor:
    """[length] int32: the number that belongs to each place; -1 where none does. Those at `length` are left out."""
    return places.new_full((length + 1,), -1).scatter_(0, places, numbers)[:length].int()


def _chunks(sizes: Tensor, length: int) -> Tensor:
    """[length] int16: the chunk in which each place of a row is, of the [2C, n] sizes of each document's."""
    chunks, documents = sizes.shape
    numbers = torch.arange(chunks, dtype=torch.int16, device=sizes.device).repeat(documents)
    return repeated(numbers, sizes.t().flatten(), length)
