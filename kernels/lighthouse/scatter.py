"""Scatter: the row of each entry, added to the positions of its spill range."""

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
from megatron_lighthouse.kernels.lighthouse.windows import collect, spread
from megatron_lighthouse.lighthouse.steps import HaloTravel
from megatron_lighthouse.once import once_differentiable
from megatron_lighthouse.ranges import profiled


@triton.jit
def head_of(p_x, strides, H):
    """Where program (·, b * H + head) finds its head."""
    i_b, i_head = tl.program_id(1) // H, tl.program_id(1) % H
    return p_x + i_b.to(tl.int64) * strides[1] + i_head.to(tl.int64) * strides[2]


@triton.jit(repr=lambda _: "lighthouse_scatter_forward")
def scatter_forward_kernel(
    p_rows,
    p_out,
    p_halo,
    p_places,
    strides_rows,
    strides_out,
    strides_halo,
    length,
    chunks,
    first,
    blocks,
    pyramid_length,
    H,
    heads,
    first_head,
    G,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    P: tl.constexpr,
    L: tl.constexpr,
    BLOCK: tl.constexpr,
    HALO: tl.constexpr,
):
    p_map = p_places + (tl.program_id(1) // (H // G)).to(tl.int64) * pyramid_length
    p_rows, p_out, p_halo = head_of(p_rows, strides_rows, H), head_of(p_out, strides_out, H), head_of(p_halo, strides_halo, H)
    strides = strides_rows[0], strides_out[0], strides_halo[0]
    chunked = length, chunks, first, blocks
    spread(p_rows, p_map, p_out, p_halo, p_out, *strides, *chunked, False, D, BLOCK_D, P, L, BLOCK, 1, False, HALO, 0, 0, 0)


@triton.jit(repr=lambda _: "lighthouse_scatter_backward")
def scatter_backward_kernel(
    p_out,
    p_rows,
    p_halo,
    p_places,
    strides_out,
    strides_rows,
    strides_halo,
    length,
    chunks,
    first,
    blocks,
    pyramid_length,
    H,
    heads,
    first_head,
    G,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    P: tl.constexpr,
    L: tl.constexpr,
    BLOCK: tl.constexpr,
    HALO: tl.constexpr,
):
    p_map = p_places + (tl.program_id(1) // (H // G)).to(tl.int64) * pyramid_length
    p_rows, p_out, p_halo = head_of(p_rows, strides_rows, H), head_of(p_out, strides_out, H), head_of(p_halo, strides_halo, H)
    strides = strides_out[0], strides_rows[0], strides_halo[0]
    chunked = length, chunks, first, blocks
    collect(p_out, p_map, p_rows, p_halo, p_out, *strides, *chunked, False, D, BLOCK_D, P, L, BLOCK, 1, False, HALO, 0, 0, 0)


def _scatter(
    rows: Tensor, halo: Tensor | None, places: Tensor, sizes: Sequence[int], travel: HaloTravel | None = None
) -> Tensor:
    with profiled("scatter"):
        assert travel is None or halo is None or halo.is_contiguous(), "it may be under way, and would be copied"
        out = new_rows(rows, sizes[0])
        launches, (rows, edge) = _launches("spread", rows, halo, places, sizes)
        start(launches.inner, (rows, out, edge, places))
        # the blocks that the halo reaches come last, for it may still be under way
        if travel is not None:
            travel.arrive()
        start(launches.edge, (rows, out, edge, places))
        return out


def _scatter_backward(
    grad: Tensor,
    places: Tensor,
    sizes: Sequence[int],
    has_halo: bool,
    some_silent: bool = False,
    travel: HaloTravel | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of the rows [S, B, H, D] and of the halo [chunks, L-1, B, H, D], from that of the output [N, B, H, D].

    Args:
        some_silent: not all rows are in the map; those that are not get zero.
    """
    with profiled("scatter backward"):
        rows, halo = new_rows(grad, sizes[3]), _new_halo(grad, sizes) if has_halo else None
        if some_silent:
            rows.zero_()
        launches, (grad, edge) = _launches("collect", grad, halo, places, sizes)
        start(launches.edge, (grad, rows, edge, places))
        if travel is not None and halo is not None:
            travel.send_back(halo)
        start(launches.inner, (grad, rows, edge, places))
        return rows, halo


class Launches(NamedTuple):
    """One launch or none for each part of the chunks."""

    edge: list[Prepared]
    """The blocks that the halo reaches, at the beginning of each chunk."""
    inner: list[Prepared]
    """All other blocks."""


def _launches(
    step: str, given: Tensor, halo: Tensor | None, places: Tensor, sizes: Sequence[int]
) -> tuple[Launches, Sequence[Tensor]]:
    """The launches that spread or collect `given`, and the tensors that they take: it, and the halo (any, if there is none)."""
    found, strides = laid_out((given, given if halo is None else halo.flatten(0, 1)))
    return _settled(step, given.shape, strides, given.dtype, places.shape, tuple(sizes), halo is not None), found


@lru_cache(1024)
def _settled(
    step: str,
    shape: torch.Size,
    strides: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
    places: torch.Size,
    sizes: tuple[int, ...],
    has_halo: bool,
) -> Launches:
    """What shapes and strides settle: made once for each."""
    (length, levels, pooling, _, chunks), (_, _, heads, dim) = sizes, shape
    coarsest, how = pooling ** (levels - 1), launch(step, dim, dtype.itemsize)
    kernel, window = (scatter_backward_kernel, coarsest) if step == "collect" else (scatter_forward_kernel, pooling)
    # windows of the shifted positions, of which there is one more: the first is cut short, and so is the last
    blocks = range(cdiv(length // chunks // window + 1, how.rows))
    edge = min(len(blocks), cdiv(coarsest // window, how.rows)) if has_halo else 0
    all_strides = (strides[0], new_strides(shape), strides[1])

    def of(blocks: range, halo: bool) -> list[Prepared]:
        given = (kernel, all_strides, places, sizes, (heads, heads, 0), blocks, how, dim)
        return [prepare_windows(*given, HALO=halo)] if blocks else []

    return Launches(of(blocks[:edge], True), of(blocks[edge:], False))


def _new_halo(grad: Tensor, sizes: Sequence[int]) -> Tensor:
    return grad.new_empty(sizes[4], sizes[1] - 1, *grad.shape[1:])


def _scatter_whole(rows: Tensor, halo: Tensor | None, places: Tensor, sizes: Sequence[int]) -> Tensor:
    return _scatter(rows, halo, places, sizes)


def _scatter_backward_whole(
    grad: Tensor, places: Tensor, sizes: Sequence[int], has_halo: bool, some_silent: bool
) -> tuple[Tensor, Tensor]:
    rows, halo = _scatter_backward(grad, places, sizes, has_halo, some_silent)
    return rows, rows.new_empty(0) if halo is None else halo


def _empty_gradients(
    grad: Tensor, places: Tensor, sizes: Sequence[int], has_halo: bool, some_silent: bool
) -> tuple[Tensor, Tensor]:
    return new_rows(grad, sizes[3]), _new_halo(grad, sizes) if has_halo else grad.new_empty(0)


scatter_op = torch.library.custom_op("lighthouse::scatter", _scatter_whole, mutates_args=())
scatter_backward_op = torch.library.custom_op("lighthouse::scatter_backward", _scatter_backward_whole, mutates_args=())
scatter_op.register_fake(lambda rows, halo, places, sizes: new_rows(rows, sizes[0]))
scatter_backward_op.register_fake(_empty_gradients)


class Scatter(torch.autograd.Function):
    """(rows, halo or None, places, sizes, travel, some_silent) -> output; `sizes` is (N, L, p, S, chunks).

    See `Steps.scatter`. `some_silent`: not all rows are in the map.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        _, halo, places, ctx.sizes, ctx.travel, some_silent = args
        ctx.how = halo is not None, some_silent
        ctx.save_for_backward(places)
        return _scatter(*args[:-1]) if ctx.travel else run(scatter_op, _scatter, *args[:-2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (places,), (has_halo, some_silent) = ctx.saved_tensors, ctx.how
        if ctx.travel:
            rows, halo = _scatter_backward(grad, places, ctx.sizes, has_halo, some_silent, ctx.travel)
        else:
            rows, halo = run(scatter_backward_op, _scatter_backward, grad, places, ctx.sizes, has_halo, some_silent)
        return rows, halo if has_halo else None, *[None] * 4
