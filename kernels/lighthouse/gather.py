"""Gather: the selected rows of the pyramids of Q, K and V, pooled on the way; one launch each way for all three."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_lighthouse.kernels.launch import cdiv, launch, launch_windows, run
from megatron_lighthouse.kernels.lighthouse.tiles import NONE
from megatron_lighthouse.kernels.lighthouse.windows import collect, spread
from megatron_lighthouse.lighthouse.steps import FarTravel
from megatron_lighthouse.ranges import profiled

NOT_TURNED = (NONE, 0, 0)
"""The `pairing` of rows that are pooled as they are."""


@triton.jit
def head_of(p_q, p_k, p_v, strides_q, strides_k, strides_v, H, heads, first_head, K, G):
    """Where program (·, b * heads + head - first_head) finds its head among H of Q and K of K and V: pointer, stride, and
    which of the G selections it has."""
    i_b = tl.program_id(1) // heads
    i_head = tl.program_id(1) % heads + first_head
    i_b64 = i_b.to(tl.int64)
    if i_head < H:
        group = i_head // (H // G)
        pointer, stride = p_q + i_b64 * strides_q[1] + i_head.to(tl.int64) * strides_q[2], strides_q[0]
    elif i_head < H + K:
        i_other = i_head - H
        group = i_other // (K // G)
        pointer, stride = p_k + i_b64 * strides_k[1] + i_other.to(tl.int64) * strides_k[2], strides_k[0]
    else:
        i_other = i_head - H - K
        group = i_other // (K // G)
        pointer, stride = p_v + i_b64 * strides_v[1] + i_other.to(tl.int64) * strides_v[2], strides_v[0]
    return pointer, stride, i_b64 * G + group


@triton.jit(repr=lambda _: "lighthouse_gather_forward")
def gather_forward_kernel(
    p_q,
    p_k,
    p_v,
    p_rows_q,
    p_rows_k,
    p_rows_v,
    p_places,
    p_turns,
    strides_q,
    strides_k,
    strides_v,
    strides_rows_q,
    strides_rows_k,
    strides_rows_v,
    length,
    chunks,
    first,
    blocks,
    pyramid_length,
    H,
    heads,
    first_head,
    K,
    G,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    P: tl.constexpr,
    L: tl.constexpr,
    BLOCK: tl.constexpr,
    TURN: tl.constexpr,
    PAIRS: tl.constexpr,
    BEFORE: tl.constexpr,
):
    p_x, stride_x, i_bg = head_of(p_q, p_k, p_v, strides_q, strides_k, strides_v, H, heads, first_head, K, G)
    p_rows, stride_rows, _ = head_of(
        p_rows_q, p_rows_k, p_rows_v, strides_rows_q, strides_rows_k, strides_rows_v, H, heads, first_head, K, G
    )
    p_map = p_places + i_bg * pyramid_length
    pointers, strides, chunked = (p_x, p_map, p_rows, p_rows, p_turns), (stride_x, stride_rows), (length, chunks, first, blocks)
    turned = tl.program_id(1) % heads + first_head < H + K
    collect(*pointers, *strides, 0, *chunked, turned, D, BLOCK_D, P, L, BLOCK, 0, True, False, TURN, PAIRS, BEFORE)


@triton.jit(repr=lambda _: "lighthouse_gather_backward")
def gather_backward_kernel(
    p_rows_q,
    p_rows_k,
    p_rows_v,
    p_q,
    p_k,
    p_v,
    p_places,
    p_turns,
    strides_rows_q,
    strides_rows_k,
    strides_rows_v,
    strides_q,
    strides_k,
    strides_v,
    length,
    chunks,
    first,
    blocks,
    pyramid_length,
    H,
    heads,
    first_head,
    K,
    G,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    P: tl.constexpr,
    L: tl.constexpr,
    BLOCK: tl.constexpr,
    TURN: tl.constexpr,
    PAIRS: tl.constexpr,
    BEFORE: tl.constexpr,
):
    p_rows, stride_rows, i_bg = head_of(
        p_rows_q, p_rows_k, p_rows_v, strides_rows_q, strides_rows_k, strides_rows_v, H, heads, first_head, K, G
    )
    p_x, stride_x, _ = head_of(p_q, p_k, p_v, strides_q, strides_k, strides_v, H, heads, first_head, K, G)
    p_map = p_places + i_bg * pyramid_length
    pointers, strides, chunked = (p_rows, p_map, p_x, p_rows, p_turns), (stride_rows, stride_x), (length, chunks, first, blocks)
    turned = tl.program_id(1) % heads + first_head < H + K
    spread(*pointers, *strides, 0, *chunked, turned, D, BLOCK_D, P, L, BLOCK, 0, True, False, TURN, PAIRS, BEFORE)


def _gather(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    places: Tensor,
    sizes: Sequence[int],
    turns: Tensor | None,
    pairing: Sequence[int],
    travel: FarTravel | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    with profiled("gather"):
        rows = _empty(query, key, value, sizes[3])
        of_queries, of_keys = _launches(query.shape[2], *key.shape[2:], value.shape[3])
        given = (gather_forward_kernel, "collect", (query, key, value, *rows), places, sizes, turns, pairing)
        if travel is None:
            _launch(*given, _joined(of_queries, of_keys))
        else:
            _launch(*given, of_keys)
            travel.set_out(rows[1:])
            _launch(*given, [of_queries])
        return rows


def _gather_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    places: Tensor,
    sizes: Sequence[int],
    turns: Tensor | None,
    pairing: Sequence[int],
    travel: FarTravel | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the tokens [N, B, ·, D], from those of the rows [S, B, ·, D]."""
    with profiled("gather backward"):
        tokens = _empty(query, key, value, sizes[0])
        of_queries, of_keys = _launches(query.shape[2], *key.shape[2:], value.shape[3])
        how, tensors = (places, sizes, turns, pairing), (query, key, value, *tokens)
        if travel is None:
            _launch(gather_backward_kernel, "spread", tensors, *how, _joined(of_queries, of_keys))
        else:
            _launch(gather_backward_kernel, "spread", tensors, *how, [of_queries])
            tensors = (query, *travel.come_home((key, value)), *tokens)
            _launch(gather_backward_kernel, "spread", tensors, *how, of_keys)
        return tokens


class Heads(NamedTuple):
    """Heads of one launch: as `launch_windows` takes them, their channels, and whether they may be turned."""

    of: tuple[int, int, int, int]
    dim: int
    turned: bool


@cache
def _launches(heads: int, others: int, dim: int, value_dim: int) -> tuple[Heads, list[Heads]]:
    """Of the queries; and of keys and values, apart where their channels differ."""
    of_queries = Heads((heads, heads, 0, others), dim, True)
    if value_dim == dim:
        return of_queries, [Heads((heads, 2 * others, heads, others), dim, True)]
    of_values = Heads((heads, others, heads + others, others), value_dim, False)
    return of_queries, [Heads((heads, others, heads, others), dim, True), of_values]


def _joined(of_queries: Heads, of_keys: list[Heads]) -> list[Heads]:
    """The queries and the first of the others in one launch, and the rest."""
    first, *rest = of_keys
    heads, count, _, others = of_queries.of
    return [Heads((heads, count + first.of[1], 0, others), of_queries.dim, of_queries.turned), *rest]


def _launch(
    kernel: Any,
    step: str,
    tensors: Sequence[Tensor],
    places: Tensor,
    sizes: Sequence[int],
    turns: Tensor | None,
    pairing: Sequence[int],
    launches: Sequence[Heads],
) -> None:
    """Launch a kernel that collects or spreads; where nothing is turned it reads no table, and any tensor stands for it."""
    length, levels, pooling, _, chunks = sizes
    window = pooling ** (levels - 1) if step == "collect" else pooling
    tables = (places if turns is None else turns,)
    for heads, dim, turned in launches:
        how = launch(step, dim, tensors[0].element_size())
        blocks = range(cdiv(length // chunks // window, how.rows))
        turn, pairs, before = pairing if turned else NOT_TURNED
        turning = {"TURN": turn, "PAIRS": pairs, "BEFORE": before}
        launch_windows(kernel, tensors, places, sizes, heads, blocks, how, dim=dim, tables=tables, **turning)


def _empty(query: Tensor, key: Tensor, value: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.empty((length, *x.shape[1:]), dtype=x.dtype, device=x.device) for x in (query, key, value))
    return q, k, v


def _gather_whole(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    places: Tensor,
    sizes: Sequence[int],
    turns: Tensor | None,
    pairing: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    return _gather(query, key, value, places, sizes, turns, pairing)


def _gather_backward_whole(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    places: Tensor,
    sizes: Sequence[int],
    turns: Tensor | None,
    pairing: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    return _gather_backward(query, key, value, places, sizes, turns, pairing)


gather_op = torch.library.custom_op("lighthouse::gather", _gather_whole, mutates_args=())
gather_backward_op = torch.library.custom_op("lighthouse::gather_backward", _gather_backward_whole, mutates_args=())
gather_op.register_fake(lambda q, k, v, places, sizes, turns, pairing: _empty(q, k, v, sizes[3]))
gather_backward_op.register_fake(lambda q, k, v, places, sizes, turns, pairing: _empty(q, k, v, sizes[0]))


class Gather(torch.autograd.Function):
    """(query, key, value, places, sizes, turns, pairing, travel) -> rows; `sizes` is (N, L, p, S, chunks). See `Steps.gather`.

    `turns` is a `Rotary`'s table, or None, and `pairing` what it says of the channels, or `NOT_TURNED`.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        *_, places, ctx.sizes, turns, ctx.pairing, ctx.travel = args
        # the map and the table alone: Q, K and V, and what they are views of, can be freed
        ctx.save_for_backward(places, turns)
        return _gather(*args) if ctx.travel else run(gather_op, _gather_whole, *args[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        places, turns = ctx.saved_tensors
        given = (*grads, places, ctx.sizes, turns, ctx.pairing)
        if ctx.travel:
            return *partial(_gather_backward, travel=ctx.travel)(*given), *[None] * 5
        return *run(gather_backward_op, _gather_backward_whole, *given), *[None] * 5
