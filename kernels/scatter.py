"""Scatter: the row of each entry, added to the positions of its spill range."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_lighthouse.geometry import Geometry
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
    p_places,
    strides_rows,
    strides_out,
    seq_length,
    pyramid_length,
    H,
    G,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    P: tl.constexpr,
    L: tl.constexpr,
    BLOCK: tl.constexpr,
):
    p_map = p_places + (tl.program_id(1) // (H // G)).to(tl.int64) * pyramid_length
    p_rows, p_out = _head(p_rows, strides_rows, H), _head(p_out, strides_out, H)
    spread(p_rows, p_map, p_out, strides_rows[0], strides_out[0], seq_length, D, BLOCK_D, P, L, BLOCK, 1, False)


@triton.jit(repr=lambda _: "lighthouse_scatter_backward")
def scatter_backward_kernel(
    p_out,
    p_rows,
    p_places,
    strides_out,
    strides_rows,
    seq_length,
    pyramid_length,
    H,
    G,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    P: tl.constexpr,
    L: tl.constexpr,
    BLOCK: tl.constexpr,
):
    p_map = p_places + (tl.program_id(1) // (H // G)).to(tl.int64) * pyramid_length
    p_rows, p_out = _head(p_rows, strides_rows, H), _head(p_out, strides_out, H)
    collect(p_out, p_map, p_rows, strides_out[0], strides_rows[0], seq_length, D, BLOCK_D, P, L, BLOCK, 1, False)


def _scatter(rows: Tensor, places: Tensor, sizes: Sequence[int]) -> Tensor:
    with step("scatter"):
        geometry = Geometry(*sizes)
        out = _empty(rows, geometry.seq_length)
        how = launch("spread", rows.shape[3], rows.element_size())
        blocks = triton.cdiv(geometry.seq_length, how.rows)
        launch_windows(scatter_forward_kernel, [rows], [out], places, geometry, blocks, how)
        return out


def _scatter_backward(grad: Tensor, places: Tensor, sizes: Sequence[int]) -> Tensor:
    """The gradient of the rows [S, B, H, D], from that of the output [N, B, H, D]."""
    with step("scatter backward"):
        geometry = Geometry(*sizes)
        rows = _empty(grad, geometry.gathered_length)
        how = launch("collect", grad.shape[3], grad.element_size())
        # one window more: the first of the shifted positions is cut short, and so is the last
        blocks = triton.cdiv(geometry.entries(geometry.levels - 1) + 1, how.rows)
        launch_windows(scatter_backward_kernel, [grad], [rows], places, geometry, blocks, how)
        return rows


def _empty(x: Tensor, length: int) -> Tensor:
    return torch.empty((length, *x.shape[1:]), dtype=x.dtype, device=x.device)


scatter_op = torch.library.custom_op("lighthouse::scatter", _scatter, mutates_args=())
scatter_backward_op = torch.library.custom_op("lighthouse::scatter_backward", _scatter_backward, mutates_args=())
scatter_op.register_fake(lambda rows, places, sizes: _empty(rows, sizes[0]))
scatter_backward_op.register_fake(lambda grad, places, sizes: _empty(grad, Geometry(*sizes).gathered_length))


class Scatter(torch.autograd.Function):
    """(rows, places, sizes) -> output; `sizes` is (N, L, p, k, m). See `Steps.scatter`."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        _, places, ctx.sizes = args
        ctx.save_for_backward(places)
        return run(scatter_op, _scatter, *args)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return run(scatter_backward_op, _scatter_backward, grad, *ctx.saved_tensors, ctx.sizes), None, None
