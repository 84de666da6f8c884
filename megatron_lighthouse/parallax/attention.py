"""Parallax attention as a function (arXiv 2605.29157)."""

from __future__ import annotations

from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.given import bounds_of, check_tokens, check_types
from megatron_lighthouse.parallax.layer import build
from megatron_lighthouse.softmax.inputs import check


def parallax_attention(
    query: Tensor,
    r: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    softmax_scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    cp_group: ProcessGroup | None = None,
    cp_comm_type: str = "p2p",
) -> Tensor:
    """Causal softmax attention, less the covariance of the values with r·k under its weights.

        p_ij = softmax_j(scale q_i·k_j),  u_ij = r_i·k_j,  o_i = Σ_j p_ij v_j - Cov_p(u_i, v)

    r = 0 is softmax attention. Adding one vector to all keys changes nothing.

    Args:
        query: [N, B, H, D], after RoPE; float64, float32, bfloat16 or float16, any strides.
        r: [N, B, H, D], rotated as the queries; not scaled.
        key, value: [N, B, G, D], G dividing H: query head h reads key/value head h // (H/G).
        softmax_scale: on q·k alone; 1/sqrt(D) by default.
        cu_seqlens: [documents + 1] int32 or int64, from 0 to N: each document is as if it were alone. B = 1, one rank.
        window: of W tokens: a query sees the W keys up to its own. All by default.
        cp_group: the context-parallel ranks among which the sequence is sharded. Each of C ranks passes its zigzag shard,
            [N/C, B, ·, D]: of 2C equal chunks, rank r holds chunk r and chunk 2C-1-r.
        cp_comm_type: 'p2p', 'all_gather' or 'a2a'.

    Returns:
        [N, B, H, D] in the query's dtype; under context parallelism, this rank's shard.

    Raises:
        ValueError: shapes or dtypes that do not fit each other, or what cannot be done. Raised before any collective.
        TypeError: an argument of another type.
        RuntimeError: under torch.func or forward-mode differentiation; in backward, a second derivative.
    """
    check_types(query=query, r=r, key=key, value=value, softmax_scale=softmax_scale, cp_group=cp_group, window=window)
    exchange = Exchange.over(cp_group)
    check(query, key, value, one_dim=True)
    check_r(query, r)
    check_tokens(query, window, exchange)
    if cu_seqlens is not None:
        _check_documents(cu_seqlens, query, exchange)
    return build(query, key, exchange, cp_comm_type, softmax_scale, window, cu_seqlens)(query, r, key, value)


def check_r(query: Tensor, r: Tensor) -> None:
    """Raises ValueError where r is not like the queries."""
    if r.shape != query.shape or (r.dtype, r.device) != (query.dtype, query.device):
        raise ValueError(
            f"r must be like the query, {tuple(query.shape)} {query.dtype} on {query.device}, got {tuple(r.shape)} {r.dtype} "
            f"on {r.device}."
        )


def _check_documents(cu_seqlens: Tensor, query: Tensor, exchange: Exchange | None) -> None:
    """Raises ValueError: see `parallax_attention`. Reads the lengths on the host."""
    if exchange is not None:
        raise ValueError(f"cu_seqlens does not go with cp_group of {exchange.size} ranks: leave one of them out.")
    bounds_of(cu_seqlens, query)
    if cu_seqlens.device != query.device:
        raise ValueError(f"cu_seqlens must be on {query.device}, as the query, not on {cu_seqlens.device}.")
