"""Scatter: the row of each entry, added to the positions of its spill range."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_lighthouse.kernels.launch import cdiv, launch, launch_windows, run
from megatron_lighthouse.kernels.lighthouse.windows import collect, spread
from megatron_lighthouse.lighthouse.steps import HaloTravel
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
        length, levels, pooling, _, chunks = sizes
        out = _empty(rows, length)
        how = launch("spread", rows.shape[3], rows.element_size())
        # of windows of level 1 of the shifted positions, of which there is one more
        blocks = range(cdiv(length // chunks // pooling + 1, how.rows))
        tensors, heads = (rows, out, rows if halo is None else halo.flatten(0, 1)), (rows.shape[2], rows.shape[2], 0)
        edge = 0
        if halo is not None:
            # the blocks that the halo reaches come last, for it may still be under way
            edge = min(len(blocks), cdiv(pooling ** (levels - 2), how.rows))
        if edge < len(blocks):
            launch_windows(scatter_forward_kernel, tensors, places, sizes, heads, blocks[edge:], how, HALO=False)
        if edge:
            if travel is not None:
                travel.arrive()
            launch_windows(scatter_forward_kernel, tensors, places, sizes, heads, blocks[:edge], how, HALO=True)
        return out


def _scatter_backward(
    grad: Tensor,
    places: Tensor,
    sizes: Sequence[int],
    has_halo: bool,
    some_silent: bool = False,
    travel: HaloTravel | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of the rows [S, B, H, D] and of the halo [chunks, L-1, B, H, D], from that of the output [N, B, H, D].

    Args:
        some_silent: not all rows are in the map; those that are not get zero.
    """
    with profiled("scatter backward"):
        length, levels, pooling, _, chunks = sizes
        rows, halo = _empty_gradients(grad, places, sizes, has_halo)
        if some_silent:
            rows.zero_()
        how = launch("collect", grad.shape[3], grad.element_size())
        # one window more: the first of the shifted positions is cut short, and so is the last
        blocks = range(cdiv(length // chunks // pooling ** (levels - 1) + 1, how.rows))
        tensors, heads = (grad, rows, halo.flatten(0, 1) if has_halo else rows), (grad.shape[2], grad.shape[2], 0)
        edge = 1 if has_halo else 0
        if edge:
            launch_windows(scatter_backward_kernel, tensors, places, sizes, heads, blocks[:edge], how, HALO=True)
            if travel is not None:
                travel.send_back(halo)
        if edge < len(blocks):
            launch_windows(scatter_backward_kernel, tensors, places, sizes, heads, blocks[edge:], how, HALO=False)
        return rows, halo


def _empty(x: Tensor, *lengths: int) -> Tensor:
    return torch.empty((*lengths, *x.shape[1:]), dtype=x.dtype, device=x.device)


def _empty_gradients(
    grad: Tensor, places: Tensor, sizes: Sequence[int], has_halo: bool, some_silent: bool = False
) -> tuple[Tensor, Tensor]:
    return _empty(grad, sizes[3]), _empty(grad, sizes[4] if has_halo else 0, sizes[1] - 1)


def _scatter_whole(rows: Tensor, halo: Tensor | None, places: Tensor, sizes: Sequence[int]) -> Tensor:
    return _scatter(rows, halo, places, sizes)


def _scatter_backward_whole(
    grad: Tensor, places: Tensor, sizes: Sequence[int], has_halo: bool, some_silent: bool = False
) -> tuple[Tensor, Tensor]:
    return _scatter_backward(grad, places, sizes, has_halo, some_silent)


scatter_op = torch.library.custom_op("lighthouse::scatter", _scatter_whole, mutates_args=())
scatter_backward_op = torch.library.custom_op("lighthouse::scatter_backward", _scatter_backward_whole, mutates_args=())
scatter_op.register_fake(lambda rows, halo, places, sizes: _empty(rows, sizes[0]))
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
        return _scatter(*args[:-1]) if ctx.travel else run(scatter_op, _scatter_whole, *args[:-2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (places,), (has_halo, some_silent) = ctx.saved_tensors, ctx.how
        if ctx.travel:
            rows, halo = _scatter_backward(grad, places, ctx.sizes, has_halo, some_silent, ctx.travel)
        else:
            rows, halo = run(scatter_backward_op, _scatter_backward_whole, grad, places, ctx.sizes, has_halo, some_silent)
        return rows, halo if has_halo else None, *[None] * 4
