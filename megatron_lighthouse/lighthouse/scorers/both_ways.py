"""Attention both ways, which `dilated` and `summary` score by: queries over keys, and keys over queries."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_lighthouse.lighthouse.geometry import Shape
from megatron_lighthouse.lighthouse.scorers.base import row_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_lighthouse.context_parallel.exchange import Exchange
    from megatron_lighthouse.lighthouse.packed.shares import Shares
    from megatron_lighthouse.lighthouse.packed.steps import PackedSteps
    from megatron_lighthouse.lighthouse.steps import Steps
    from megatron_lighthouse.sequence.documents import Documents


def attended_both_ways(
    query: Tensor, key: Tensor, value: Tensor, steps: Steps, exchange: Exchange | None, scale: float | None
) -> Tensor:
    """The norms of causal attention on (Q, K, V) and on (K, Q, V): [2, B, G, n] for [n, B, H, D] and twice [n, B, G, D].

    Source: the paper's "dilated" scorer, for H = G. Ours: the scale is the layer's softmax's; of grouped queries a token's
    first norm is that of its group's H/G rows taken as one vector, and in the second the mean of these queries stands for them.
    """
    import torch

    layout = None if exchange is None else exchange.layout
    values = whole(value, exchange)
    by_query = steps.attended_norms(query, whole(key, exchange), values, layout, scale)
    mean = whole(group_mean(query, key.shape[2]), exchange)
    by_key = steps.attended_norms(key, mean, values, layout, scale)
    return torch.stack([by_query, by_key])


def whole(x: Tensor, exchange: Exchange | None) -> Tensor:
    """All ranks' [n, ...], as one sequence."""
    return x if exchange is None else exchange.whole(x, "scorer")


def packed_both_ways(
    query: Tensor, key: Tensor, value: Tensor, steps: PackedSteps, documents: Documents, scale: float | None
) -> Tensor:
    """The same of rows that are documents, end to end."""
    import torch

    by_query = steps.attended_norms(query, key, value, documents, scale=scale)
    by_key = steps.attended_norms(key, group_mean(query, key.shape[2]), value, documents, scale=scale)
    return torch.stack([by_query, by_key])


def shared_both_ways(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    steps: PackedSteps,
    shares: Shares,
    unit: int,
    exchange: Exchange,
    scale: float | None,
) -> Tensor:
    """The same of the windows that this rank owns, a row for every `unit` of their tokens: [2, B, G, own rows]."""
    import torch

    documents, index, each = shares.packing.compact_documents(unit), shares.own_in_row(unit), shares.window // unit
    own = tuple((document, first * each, end * each) for document, first, end in shares.own_runs)

    def whole(x: Tensor) -> Tensor:
        return shares.whole(x.unflatten(0, (-1, each)), exchange, "scorer").flatten(0, 1)

    def norms(queries: Tensor, keys: Tensor) -> Tensor:
        in_row = queries.new_zeros(documents.tokens, *queries.shape[1:])
        in_row[index] = queries
        return steps.attended_norms(in_row, keys, values, documents, own, scale)[..., index]

    values = whole(value)
    by_query = norms(query, whole(key))
    return torch.stack([by_query, norms(key, whole(group_mean(query, key.shape[2])))])


def both_ways_sent(rows: int, shape: Shape, size: int) -> int:
    """Bytes that each of `size` ranks sends for this: keys, values and mean queries of its `rows`."""
    return (size - 1) * 3 * rows * shape.batch * shape.groups * shape.dim * shape.itemsize


def both_ways_moved(rows: int, shape: Shape) -> float:
    """Bytes that both read: queries, keys and values, then keys, mean queries and values."""
    return row_bytes(rows, shape, shape.heads + 5 * shape.groups)


def both_ways_flops(rows: int, batch: int, shape: Shape) -> float:
    """Operations of both over `rows` rows of `batch` batch elements: two causal products each, of H and of G heads."""
    return 2.0 * rows**2 * batch * (shape.heads + shape.groups) * shape.dim


def group_mean(query: Tensor, groups: int) -> Tensor:
    """The mean query of each group (ours): [n, B, H, D] -> [n, B, G, D], in the query's dtype."""
    from megatron_lighthouse.sums import one_by_one

    if query.shape[2] == groups:
        return query
    grouped = query.unflatten(2, (groups, -1))
    return (one_by_one(grouped, 3) / grouped.shape[3]).to(query.dtype)
