"""Softmax attention within documents whose tokens lie on several ranks, in document zigzag (`sequence.documents`).

The schemes are those of one sequence, for all documents at once: a rank's early and late chunks are those of every document.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.context_parallel.heads import share_of_heads
from megatron_lighthouse.context_parallel.parts import Tensors
from megatron_lighthouse.context_parallel.schemes import check_scheme, scheme
from megatron_lighthouse.notice import say_once
from megatron_lighthouse.sequence.documents import Documents
from megatron_lighthouse.softmax.base import scale_of
from megatron_lighthouse.softmax.blocks import BLOCKS
from megatron_lighthouse.softmax.document_blocks import OneByOne, OverDocuments, Within
from megatron_lighthouse.softmax.documents import documents_attention
from megatron_lighthouse.softmax.rows import SHARDS
from megatron_lighthouse.softmax.windowed_documents import WindowedDocuments, within_documents


@dataclass(frozen=True)
class ShardedDocuments:
    """An `AttendDocuments` over the tokens of all ranks: [t / C, 1, heads, D] each, of which the documents are those of t."""

    exchange: Exchange
    comm_type: str
    within: Within
    """Over rows document by document."""
    attend: Callable[..., Tensor] | None
    """Over whole rows of a rank's share of the heads, for 'a2a'."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, documents: Documents, sinks: Tensor | None = None) -> Tensor:
        if problem := documents.zigzag_problem(self.exchange.size):
            raise ValueError(problem)

        def whole(near: Tensors, far: Tensors, *own: Tensor) -> Tensor:
            """Of rows chunk by chunk."""
            assert self.attend is not None
            chunks = documents.in_chunks(range(2 * self.exchange.size), self.exchange.size)
            query, key, value = (chunks.in_documents(x) for x in (*near, *far))
            return chunks.in_order(self.attend(query, key, value, documents, *own))

        block = OverDocuments(self.within, documents, self.exchange.size)
        return scheme(self.comm_type, self.exchange, lambda: block, lambda: whole)((query,), (key, value), sinks)


def sharded_documents_attention(
    name: str,
    query: Tensor,
    key: Tensor,
    exchange: Exchange,
    comm_type: str,
    softmax_scale: float | None = None,
    *,
    value_dim: int | None = None,
    window: int | None = None,
    sinks: bool = False,
) -> Callable[..., Tensor]:
    """Causal attention within each document, over the tokens of all ranks.

    Args:
        name: of the backend, as for `inner_attention`.
        query: [t / C, 1, H, D]; key: [t / C, 1, G, D]; of these only heads, D, dtype and device count.
        comm_type: see `megatron_lighthouse.context_parallel.schemes.scheme`.
        value_dim: of the values, where it is not D.
        window: tokens before its own that a token sees; None: all.
        sinks: whether every call brings a sink for each head, behind the documents.

    Raises:
        ValueError: a scheme that is not known, heads that 'a2a' cannot share out, or a backend that cannot do it.
    """
    scale = scale_of(query, softmax_scale)
    check_scheme(comm_type, query, key, exchange.size)
    if window is not None:
        return WindowedDocuments(within_documents(name, query, key, scale, value_dim, window, SHARDS), exchange, window)
    if comm_type == "a2a":
        q, k = (share_of_heads(x, exchange.size) for x in (query, key))
        attend = documents_attention(name, q, k, scale, value_dim=value_dim, sinks=sinks)
        return ShardedDocuments(exchange, comm_type, OneByOne(BLOCKS["sdpa"](scale)), attend)
    within = within_documents(name, query, key, scale, value_dim, None, SHARDS)
    if query.is_cuda and isinstance(within, OneByOne):
        say_once(
            "lighthouse: packed documents over shards by --lighthouse-inner sdpa are a call each, so many in a row are slow: "
            "fa2 takes all at once, and so does --cp-comm-type a2a."
        )
    return ShardedDocuments(exchange, comm_type, within, None)
