"""Softmax attention within documents whose tokens lie on several ranks, in document zigzag (`sequence.documents`).

The schemes are those of one sequence, for all documents at once: a rank's early and late chunks are those of every document.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.context_parallel.heads import share_of_heads
from megatron_lighthouse.context_parallel.parts import Tensors
from megatron_lighthouse.context_parallel.schemes import check_scheme, scheme
from megatron_lighthouse.notice import say_once
from megatron_lighthouse.sequence.documents import Documents
from megatron_lighthouse.softmax.backends import choose_for_blocks
from megatron_lighthouse.softmax.base import scale_of
from megatron_lighthouse.softmax.blocks import BLOCKS
from megatron_lighthouse.softmax.document_blocks import AllAtOnce, OneByOne, OverDocuments, Within
from megatron_lighthouse.softmax.documents import AttendDocuments, documents_attention
from megatron_lighthouse.softmax.names import OVER_SHARDED_DOCUMENTS


@dataclass(frozen=True)
class ShardedDocuments:
    """An `AttendDocuments` over the tokens of all ranks: [t / C, 1, heads, D] each, of which the documents are those of t."""

    exchange: Exchange
    comm_type: str
    within: Within
    """Over rows document by document."""
    attend: AttendDocuments | None
    """Over whole rows of a rank's share of the heads, for 'a2a'."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
        if problem := documents.zigzag_problem(self.exchange.size):
            raise ValueError(problem)

        def whole(near: Tensors, far: Tensors) -> Tensor:
            """Of rows chunk by chunk."""
            assert self.attend is not None
            chunks = documents.in_chunks(range(2 * self.exchange.size), self.exchange.size)
            query, key, value = (chunks.in_documents(x) for x in (*near, *far))
            return chunks.in_order(self.attend(query, key, value, documents))

        block = OverDocuments(self.within, documents, self.exchange.size)
        return scheme(self.comm_type, self.exchange, lambda: block, lambda: whole)((query,), (key, value))


def sharded_documents_attention(
    name: str,
    query: Tensor,
    key: Tensor,
    exchange: Exchange,
    comm_type: str,
    softmax_scale: float | None = None,
    value_dim: int | None = None,
) -> ShardedDocuments:
    """Causal attention within each document, over the tokens of all ranks.

    Args:
        name: of the backend, as for `inner_attention`.
        query: [t / C, 1, H, D]; key: [t / C, 1, G, D]; of these only heads, D, dtype and device count.
        comm_type: see `megatron_lighthouse.context_parallel.schemes.scheme`.
        value_dim: of the values, where it is not D.

    Raises:
        ValueError: a scheme that is not known, heads that 'a2a' cannot share out, or a backend that cannot do it.
    """
    scale = scale_of(query, softmax_scale)
    check_scheme(comm_type, query, key, exchange.size)
    rows = (query.device, query.dtype, query.shape[2], key.shape[2], query.shape[3], value_dim)
    if comm_type == "a2a":
        q, k = (share_of_heads(x, exchange.size) for x in (query, key))
        attend = documents_attention(name, q, k, scale, value_dim)
        return ShardedDocuments(exchange, comm_type, OneByOne(BLOCKS["sdpa"](scale)), attend)
    chosen = choose_for_blocks(name, OVER_SHARDED_DOCUMENTS, *rows)
    if chosen == "fa2":
        return ShardedDocuments(exchange, comm_type, AllAtOnce(scale), None)
    if query.is_cuda:
        say_once(
            f"lighthouse: packed documents over shards by --lighthouse-inner {chosen} are a call each, so many in a row are "
            "slow: fa2 takes all at once, and so does --cp-comm-type a2a."
        )
    return ShardedDocuments(exchange, comm_type, OneByOne(BLOCKS[chosen](scale)), None)
