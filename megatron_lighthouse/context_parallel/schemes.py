"""Attention over shards: plain causal attention of a sequence whose rows lie on several ranks, in zigzag order.

Three schemes, as Megatron's `--cp-comm-type` names them. Each rank gives its rows [2s, B, H, D] and gets their output; rows may
be tokens (a dense layer) or gathered rows (Lighthouse), for both come in 2C equal chunks. In all three a rank's work is

    its own rows, causal | all its rows to the early chunks of lower ranks | its late rows to all rows of higher ranks

which is the causal triangle, cut so that all ranks have as much to do.
"""

from __future__ import annotations

import math

from torch import Tensor

from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.context_parallel.gathered import Gathered
from megatron_lighthouse.context_parallel.heads import attend_by_heads
from megatron_lighthouse.context_parallel.ring import RingAttention
from megatron_lighthouse.softmax.backends import Attend, inner_attention
from megatron_lighthouse.softmax.blocks import block_for

COMM_TYPES = ("p2p", "all_gather", "a2a")


def sharded_attention(
    name: str, query: Tensor, key: Tensor, exchange: Exchange, comm_type: str, softmax_scale: float | None = None
) -> Attend:
    """Causal attention over the rows of all ranks.

    Args:
        name: of the backend, as for `inner_attention`.
        query: [2s, B, H, D]; key: [2s, B, G, D]; of these only shapes, dtype and device count.
        comm_type: 'p2p' passes keys and values from rank to rank while attending, 'all_gather' collects them first, 'a2a'
            exchanges rows for heads.

    Raises:
        ValueError: a scheme that is not known, heads that 'a2a' cannot share out, or a backend that cannot do it.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if softmax_scale is None else softmax_scale
    if problem := comm_type_problem(comm_type, query.shape[2], key.shape[2], exchange.size):
        raise ValueError(problem)
    if comm_type == "a2a":
        q, k = (x[:, :, : x.shape[2] // exchange.size] for x in (query, key))
        whole = inner_attention(name, q, k, scale)
        return lambda q, k, v: attend_by_heads(q, k, v, whole, exchange)
    block = block_for(name, query, key)
    if comm_type == "p2p":
        return RingAttention(block, exchange, scale)
    return lambda q, k, v: Gathered.apply(q, k, v, block, exchange, scale)


def comm_type_problem(comm_type: str, heads: int, groups: int, size: int) -> str | None:
    """Why `size` ranks cannot attend by this scheme; None where they can. Heads and groups are those of one rank."""
    if comm_type not in COMM_TYPES:
        what = "is Transformer Engine's" if comm_type == "a2a+p2p" else "is not known"
        return (
            f"--cp-comm-type {comm_type} {what}: use {', '.join(COMM_TYPES[:2])} or {COMM_TYPES[2]}, or "
            "--transformer-impl transformer_engine."
        )
    if comm_type == "a2a" and (heads % size or groups % size):
        fits = [n for n in range(2, groups + 1) if heads % n == 0 and groups % n == 0]
        other = f", or --context-parallel-size {' or '.join(map(str, fits))}" if fits else ""
        return (
            f"--cp-comm-type a2a shares out the {heads} query and {groups} key/value heads of a tensor-parallel rank among "
            f"--context-parallel-size {size}, which must divide both: use --cp-comm-type p2p{other}."
        )
    return None
