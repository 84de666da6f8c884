"""Gather: the selected rows of the pyramids of Q, K and V, pooled on the way; one launch each way for all three."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lighthouse.kernels.launch import (
    Prepared,
    cdiv,
    laid_out,
    launch,
    new_rows,
    new_strides,
    prepare_windows,
    run,
    start,
)
from megatron_lighthouse.kernels.lighthouse.tiles import NONE
from megatron_lighthouse.kernels.lighthouse.windows import collect, spread
from megatron_lighthouse.lighthouse.steps import FarTravel
from megatron_lighthouse.once import once_differentiable
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
        launches, given = _launches("collect", (query, key, value), places, sizes, pairing)
        tensors = (*given, *rows, places, places if turns is None else turns)  # no table is read where nothing is turned
        if travel is None:
            start(launches.all, tensors)
        else:
            start(launches.far, tensors)
            travel.set_out(rows[1:])
            start(launches.near, tensors)
        return rows


def _gather_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    places: Tensor,
    sizes: Sequence[int],
    turns: Tensor | None,
    pairing: Sequence[int],
    travel: FarTravel | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the tokens [N, B, ·, D], from those of the rows [S, B, ·, D]."""
    with profiled("gather backward"):
        tokens = _empty(grad_q, grad_k, grad_v, sizes[0])
        launches, given = _launches("spread", (grad_q, grad_k, grad_v), places, sizes, pairing)
        behind = (*tokens, places, places if turns is None else turns)
        if travel is None:
            start(launches.all, (*given, *behind))
        else:
            start(launches.near, (*given, *behind))
            far = travel.come_home((grad_k, grad_v))
            launches, given = _launches("spread", (grad_q, *far), places, sizes, pairing)
            start(launches.far, (*given, *behind))
        return tokens


class Launches(NamedTuple):
    """The launches for queries alone, for keys and values alone, and for all three, in as few as their channels allow."""

    near: list[Prepared]
    """Of the queries."""
    far: list[Prepared]
    """Of keys and values: two where their channels differ; none of values without heads."""
    all: list[Prepared]


def _launches(
    step: str, given: tuple[Tensor, ...], places: Tensor, sizes: Sequence[int], pairing: Sequence[int]
) -> tuple[Launches, Sequence[Tensor]]:
    """The launches that collect or spread the tensors given; and these, with a contiguous last dimension."""
    found, strides = laid_out(given)
    shapes = tuple([x.shape for x in found])
    return _settled(step, shapes, strides, found[0].dtype, places.shape, tuple(sizes), tuple(pairing)), found


@lru_cache(1024)
def _settled(
    step: str,
    shapes: tuple[torch.Size, ...],
    strides: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
    places: torch.Size,
    sizes: tuple[int, ...],
    pairing: tuple[int, ...],
) -> Launches:
    """What shapes and strides settle: made once for each."""
    length, levels, pooling, _, chunks = sizes
    (heads, dim), (others, key_dim), (more, value_dim) = (shape[2:] for shape in shapes)
    kernel = gather_forward_kernel if step == "collect" else gather_backward_kernel
    window = pooling ** (levels - 1) if step == "collect" else pooling
    all_strides = (*strides, *map(new_strides, shapes))

    def of(count: int, first: int, dim: int, turned: bool = True) -> Prepared:
        """Of so many heads, from the first on."""
        how = launch(step, dim, dtype.itemsize)
        blocks = range(cdiv(length // chunks // window, how.rows))
        turn, pairs, before = pairing if turned else NOT_TURNED
        turning = {"TURN": turn, "PAIRS": pairs, "BEFORE": before}
        return prepare_windows(kernel, all_strides, places, sizes, (heads, count, first, others), blocks, how, dim, **turning)

    near = [of(heads, 0, dim)]
    if key_dim == value_dim == dim:
        return Launches(near, [of(others + more, heads, dim)], [of(heads + others + more, 0, dim)])
    keys, values = [of(others, heads, key_dim)], [of(more, heads + others, value_dim, turned=False)] if more else []
    return Launches(near, [*keys, *values], [*([of(heads + others, 0, dim)] if key_dim == dim else [*near, *keys]), *values])


def _empty(query: Tensor, key: Tensor, value: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    return new_rows(query, length), new_rows(key, length), new_rows(value, length)


# custom ops, whose types torch reads: a `travel` is none that it knows
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
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    places: Tensor,
    sizes: Sequence[int],
    turns: Tensor | None,
    pairing: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    return _gather_backward(grad_q, grad_k, grad_v, places, sizes, turns, pairing)


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
        return _gather(*args) if ctx.travel else run(gather_op, _gather, *args[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        places, turns = ctx.saved_tensors
        given = (grads[0], grads[1], grads[2], places, ctx.sizes, turns, ctx.pairing)
        if ctx.travel:
            return *_gather_backward(*given, ctx.travel), *[None] * 5
        return *run(gather_backward_op, _gather_backward, *given), *[None] * 5
