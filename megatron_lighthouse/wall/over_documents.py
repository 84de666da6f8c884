"""Wall over packed documents, each as if it were alone; of several ranks each holds its tokens in document zigzag.

Wall sums gates over pieces of the row, whatever documents these are of. So what ranks hold goes first to where the zigzag of
the whole row as one sequence has it, queries, keys, values and streams in one message, and the output goes back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.context_parallel.transfer import Between, Queue, Transfer
from megatron_lighthouse.sequence.documents import Documents
from megatron_lighthouse.wall.pieces import Sight

if TYPE_CHECKING:
    from megatron_lighthouse.softmax.documents import AttendDocuments

PURPOSE = "documents"
"""Of what is sent, in counts."""


def sight_of(documents: Documents) -> Sight:
    """A token sees its own document."""
    return Sight((0, *accumulate(documents.lengths)))


@dataclass(frozen=True)
class PlacedDocuments:
    """A layer over the documents of a row, which each call brings."""

    attend: Callable[..., tuple[Tensor, Callable[[], Tensor] | None]]
    """Of rows as one sequence has them, and of the `Sight`."""
    exchange: Exchange | None

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *streams: Tensor,
        documents: Documents,
        attend: AttendDocuments | None = None,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, Callable[[], Tensor] | None]:
        rows, sight = (query, key, value, *streams), sight_of(documents)
        if self.exchange is None:
            return self.attend(sight, *rows, sinks=sinks)
        there, back = ways(documents, self.exchange)
        out, again = self.attend(sight, *there(*rows), sinks=sinks)
        return back(out)[0], again


def ways(documents: Documents, exchange: Exchange) -> tuple[Transfer, Transfer]:
    """From document zigzag to that of the row as one sequence, and back; made once for all layers.

    Waits for the device once: how much is sent must be known to the host.
    """
    made: dict[Exchange, tuple[Transfer, Transfer]] = vars(documents).setdefault("as_one_sequence", {})
    if exchange not in made:
        if problem := documents.zigzag_problem(exchange.size):
            raise ValueError(problem)
        size, row = exchange.size, torch.arange(documents.tokens, device=documents.cu_seqlens.device)
        chunk = row // (documents.tokens // (2 * size))
        of_sequence = torch.minimum(chunk, 2 * size - 1 - chunk)  # the rank of each token
        of_documents = torch.empty_like(row)
        of_documents[documents.in_chunks(range(2 * size), size).by_chunk] = of_sequence
        own, wanted = documents.rows_of_rank(exchange.layout), exchange.own(row)
        goes, comes = (Queue.of(partner[x], x, len(row), size) for partner, x in ((of_sequence, own), (of_documents, wanted)))
        counts, number = torch.cat([goes.counts, comes.counts]).tolist(), torch.arange(len(own), device=row.device)
        here, there = (queue.end(n, number, len(own)) for queue, n in ((goes, counts[:size]), (comes, counts[size:])))
        way = Between(here, there, exchange.rank)
        made[exchange] = Transfer(exchange, PURPOSE, way), Transfer(exchange, PURPOSE, way.back)
    return made[exchange]
