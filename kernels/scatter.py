"""Scatter: the row of each entry, added to the positions of its spill range."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_lighthouse.kernels.launch import launch, launch_windows, run
from megatron_lighthouse.kernels.windows import collect, spread
from megatron_lighthouse.ranges import step


@triton.jit
def _head(p_x, strides, H):
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
    pyramid_length,
    H,
    G,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    P: tl.constexpr,
    L: tl.constexpr,
    BLOCK: tl.constexpr,
    HALO: tl.constexpr,
):
    p_map = p_places + (tl.program_id(1) // (H // G)).to(tl.int64) * pyramid_length
    p_rows, p_out, p_halo = _head(p_rows, strides_rows, H), _head(p_out, strides_out, H), _head(p_halo, strides_halo, H)
    strides = strides_rows[0], strides_out[0], strides_halo[0]
    spread(p_rows, p_map, p_out, p_halo, *strides, length, chunks, D, BLOCK_D, P, L, BLOCK, 1, False, HALO)


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
    pyramid_length,
    H,
    G,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    P: tl.constexpr,
    L: tl.constexpr,
    BLOCK: tl.constexpr,
    HALO: tl.constexpr,
):
    p_map = p_places + (tl.program_id(1) // (H // G)).to(tl.int64) * pyramid_length
    p_rows, p_out, p_halo = _head(p_rows, strides_rows, H), _head(p_out, strides_out, H), _head(p_halo, strides_halo, H)
    strides = strides_out[0], strides_rows[0], strides_halo[0]
    collect(p_out, p_map, p_rows, p_halo, *strides, length, chunks, D, BLOCK_D, P, L, BLOCK, 1, False, HALO)


def _scatter(rows: Tensor, halo: Tensor | None, places: Tensor, sizes: Sequence[int]) -> Tensor:
    with step("scatter"):
        out = _empty(rows, sizes[0])
        how = launch("spread", rows.shape[3], rows.element_size())
        blocks = triton.cdiv(sizes[0] // sizes[4], how.rows)
        tensors = (rows, out, rows if halo is None else halo.flatten(0, 1))
        heads = (rows.shape[2], rows.shape[2])
        launch_windows(scatter_forward_kernel, tensors, places, sizes, heads, blocks, how, HALO=halo is not None)
        return out


def _scatter_backward(grad: Tensor, places: Tensor, sizes: Sequence[int], has_halo: bool) -> tuple[Tensor, Tensor]:
    """The gradients of the rows [S, B, H, D] and of the halo [chunks, L-1, B, H, D], from that of the output [N, B, H, D]."""
    with step("scatter backward"):
        length, levels, pooling, _, chunks = sizes
        rows, halo = _empty_gradients(grad, places, sizes, has_halo)
        how = launch("collect", grad.shape[3], grad.element_size())
        # one window more: the first of the shifted positions is cut short, and so is the last
        blocks = triton.cdiv(length // chunks // pooling ** (levels - 1) + 1, how.rows)
        tensors = (grad, rows, halo.flatten(0, 1) if has_halo else rows)
        heads = (grad.shape[2], grad.shape[2])
        launch_windows(scatter_backward_kernel, tensors, places, sizes, heads, blocks, how, HALO=has_halo)
        return rows, halo


def _empty(x: Tensor, *lengths: int) -> Tensor:
    return torch.empty((*lengths, *x.shape[1:]), dtype=x.dtype, device=x.device)


def _empty_gradients(grad: Tensor, places: Tensor, sizes: Sequence[int], has_halo: bool) -> tuple[Tensor, Tensor]:
    return _empty(grad, sizes[3]), _empty(grad, sizes[4] if has_halo else 0, sizes[1] - 1)


scatter_op = torch.library.custom_op("lighthouse::scatter", _scatter, mutates_args=())
scatter_backward_op = torch.library.custom_op("lighthouse::scatter_backward", _scatter_backward, mutates_args=())
scatter_op.register_fake(lambda rows, halo, places, sizes: _empty(rows, sizes[0]))
scatter_backward_op.register_fake(_empty_gradients)


class Scatter(torch.autograd.Function):
    """(rows, halo or None, places, sizes) -> output; `sizes` is (N, L, p, S, chunks). See `Steps.scatter`."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        _, halo, places, ctx.sizes = args
        ctx.has_halo = halo is not None
        ctx.save_for_backward(places)
        return run(scatter_op, _scatter, *args)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, halo = run(scatter_backward_op, _scatter_backward, grad, *ctx.saved_tensors, ctx.sizes, ctx.has_halo)
        return rows, halo if ctx.has_halo else None, None, None
