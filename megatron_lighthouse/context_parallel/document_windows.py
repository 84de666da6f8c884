"""Windows within documents: each token sees so many before it in its document, of which other ranks may hold some.

A rank's two chunks of a document (`sequence.documents`) see themselves and, before each, the last tokens of earlier chunks: its
halo. Runs are what one chunk of one document sees, and end with that chunk: those of a rank's early chunks come first.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy
import torch
from torch import Tensor

from megatron_lighthouse.context_parallel.transfer import Between, Queue
from megatron_lighthouse.sequence.documents import Documents, repeated, runs
from megatron_lighthouse.sequence.layout import Layout


@dataclass(frozen=True, eq=False)
class Runs:
    """Rows in runs, end to end."""

    lengths: tuple[int, ...]
    """As the host knows them."""
    cu_seqlens: Tensor
    """[runs + 1], int32."""
    chunks: tuple[int, ...] = (0,)
    """The same for near and far rows, of which the last ones are near: see `context_parallel.parts.Mask`."""

    @staticmethod
    def of(documents: Documents) -> Runs:
        """Whole documents."""
        return Runs(documents.lengths, documents.cu_seqlens)


@dataclass(frozen=True, eq=False)
class Windows:
    """Of the documents' tokens that a rank holds, what they see."""

    documents: Documents
    layout: Layout
    before: int
    """Tokens before its own that a token sees."""

    @staticmethod
    def of(documents: Documents, layout: Layout, before: int) -> Windows:
        """Made once for all layers."""
        made: dict[tuple[Layout, int], Windows] = vars(documents).setdefault("windows", {})
        return made.setdefault((layout, before), Windows(documents, layout, before))

    @cached_property
    def near(self) -> Runs:
        """The rank's own tokens, as it holds them."""
        return self._runs(self._seen(self.layout.rank)[1])

    @cached_property
    def far(self) -> Runs:
        """These, and before each run its halo."""
        _, own, halo, _ = self._seen(self.layout.rank)
        return self._runs(own + halo)

    @cached_property
    def way(self) -> Between:
        """From this rank's tokens to the far rows of all ranks."""
        size, rank = self.layout.size, self.layout.rank
        rows = [self.documents.rows_of_rank(Layout(size, other)) for other in range(size)]
        held = len(rows[rank])
        owner, place = (torch.empty(size * held, dtype=torch.int64, device=rows[0].device) for _ in range(2))
        for other, here in enumerate(rows):
            owner[here], place[here] = other, torch.arange(held, device=here.device)
        found = [self._tokens(other) for other in range(size)]
        tokens, copy = [x for x, _ in found], torch.cat([x for _, x in found])
        wanted, span = torch.cat(tokens), max(map(len, tokens))
        by = torch.cat([torch.full_like(x, other) for other, x in enumerate(tokens)])
        places = [torch.arange(len(x), device=x.device) for x in tokens]
        sends = Queue.of(torch.where(owner[wanted] == rank, by, size), torch.cat(places), span, size)
        receives = Queue.of(owner[tokens[rank]], places[rank], span, size)
        to, came = torch.stack([sends.counts, receives.counts]).tolist()  # which the host reads once a micro-batch
        away = sends.end(to, place[wanted], held, copy, self.copies)
        return Between(away, receives.end(came, places[rank], len(tokens[rank])), rank)

    @cached_property
    def copies(self) -> int:
        """Chunks that want a token at most, its own among them; a power of two, so that batches have few numbers of them."""
        chunks, lengths = 2 * self.layout.size, numpy.array(self.documents.lengths)
        least = numpy.maximum(lengths // chunks, 1)  # tokens of a chunk that has any
        most = numpy.minimum(2 + (self.before - 1) // least, numpy.minimum(lengths, chunks)).max()
        return min(1 << (int(most) - 1).bit_length(), chunks)

    def _seen(self, rank: int) -> tuple[numpy.ndarray, ...]:
        """Of each run of a rank: the token that its chunk begins with, that chunk's tokens, its halo's, and the number of its
        chunk among those of its document that have tokens."""
        size = self.layout.size
        bounds = numpy.cumsum((0, *self.documents.lengths))
        sizes = numpy.stack([numpy.diff((bounds + chunk) // (2 * size)) for chunk in range(2 * size)])
        numbers = (sizes > 0).cumsum(0)
        found = []
        for chunk in Layout(size, rank).chunks:
            earlier = sizes[:chunk].sum(0)
            own, halo = sizes[chunk], numpy.minimum(self.before, earlier)
            found.append(numpy.stack([bounds[:-1] + earlier, own, halo, numbers[chunk]])[:, own > 0])
        return tuple(numpy.concatenate(found, axis=1))

    @cached_property
    def _numbers(self) -> Tensor:
        """[t] int64: of each token's chunk, as in `_seen`."""
        sizes = self.documents.chunk_sizes(self.layout.size)
        return repeated((sizes > 0).cumsum(0).t().flatten(), sizes.t().flatten(), self.documents.tokens)

    def _tokens(self, rank: int) -> tuple[Tensor, Tensor]:
        """[far rows] int64 each: the tokens that a rank's far rows are, and which of its token's copies each is: of the chunks
        that want it, its own and then later ones, which follow each other."""
        begins, own, halo, number = self._seen(rank)
        far, device = own + halo, self.documents.cu_seqlens.device
        first, bounds, lengths, numbers = (
            torch.from_numpy(x).to(device) for x in (begins - halo, numpy.cumsum((0, *far)), far, number)
        )
        tokens = runs(first, bounds, int(far.sum()))
        return tokens, repeated(numbers, lengths, len(tokens)) - self._numbers[tokens]

    def _runs(self, lengths: numpy.ndarray) -> Runs:
        bounds = torch.from_numpy(numpy.cumsum((0, *lengths)).astype(numpy.int32))
        return Runs(tuple(lengths.tolist()), bounds.to(self.documents.cu_seqlens.device))
