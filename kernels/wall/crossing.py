"""Keys of earlier pieces, decayed further to an anchor, and back: `megatron_lighthouse.wall.decay`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lighthouse.kernels.launch import cdiv, enqueue, last_contiguous, padded, strides
from megatron_lighthouse.kernels.parallax.tiles import put, tile
from megatron_lighthouse.kernels.wall.decays import place
from megatron_lighthouse.kernels.wall.tiles import blocks_of


@triton.jit
def factor_of(p_factor, strides_factor, i_piece, i_b, i_h, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """[1, BLOCK_K], of a piece's keys."""
    i_k = tl.arange(0, BLOCK_K)
    p_factor += i_piece.to(tl.int64) * strides_factor[0] + i_b * strides_factor[1] + i_h * strides_factor[2]
    return tl.load(p_factor + i_k, mask=i_k < K, other=0.0)[None, :]


@triton.jit(repr=lambda _: "wall_crossing", do_not_specialize=["rows", "step"])
def crossing_kernel(
    p_x,
    p_factor,
    p_out,
    strides_x,
    strides_factor,
    strides_out,
    H,
    rows,
    step,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Of each piece of `step` rows."""
    i_tile, i_b, i_h, i_m, end = place(rows, step, H, ROWS)
    factor = factor_of(p_factor, strides_factor, i_tile // ((step + ROWS - 1) // ROWS), i_b, i_h, K, BLOCK_K)
    x = tile(p_x + i_b * strides_x[1] + i_h * strides_x[2], strides_x[0], i_m, end, K, BLOCK_K)
    put(p_out + i_b * strides_out[1] + i_h * strides_out[2], strides_out[0], i_m, end, x * factor, K, BLOCK_K)


@triton.jit(repr=lambda _: "wall_crossing_backward", do_not_specialize=["rows", "step"])
def backward_kernel(
    p_x,
    p_grad,
    p_factor,
    p_out,
    p_totals,
    strides_x,
    strides_grad,
    strides_factor,
    strides_out,
    strides_totals,
    H,
    rows,
    step,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Likewise: adds to the keys' gradients, and sums x grad over each tile."""
    i_tile, i_b, i_h, i_m, end = place(rows, step, H, ROWS)
    factor = factor_of(p_factor, strides_factor, i_tile // ((step + ROWS - 1) // ROWS), i_b, i_h, K, BLOCK_K)
    grad = tile(p_grad + i_b * strides_grad[1] + i_h * strides_grad[2], strides_grad[0], i_m, end, K, BLOCK_K).to(tl.float32)
    x = tile(p_x + i_b * strides_x[1] + i_h * strides_x[2], strides_x[0], i_m, end, K, BLOCK_K).to(tl.float32)
    p_out += i_b * strides_out[1] + i_h * strides_out[2]
    put(p_out, strides_out[0], i_m, end, tile(p_out, strides_out[0], i_m, end, K, BLOCK_K) + grad * factor, K, BLOCK_K)
    i_k = tl.arange(0, BLOCK_K)
    p_totals += i_tile.to(tl.int64) * strides_totals[0] + i_b * strides_totals[1] + i_h * strides_totals[2]
    tl.store(p_totals + i_k, tl.sum(x * grad, 0), mask=i_k < K)


def cross(out: Tensor, key: Tensor, factors: Tensor, step: int) -> None:
    """See `megatron_lighthouse.wall.decay`."""
    _launch(crossing_kernel, [last_contiguous(key), factors.contiguous(), out], step)


def cross_backward(out: Tensor, crossed: Tensor, grad: Tensor, factors: Tensor, step: int) -> Tensor:
    """Likewise."""
    rows, batch, heads, dim = crossed.shape
    tiles = cdiv(step, blocks_of("decay", dim, 4).rows)
    totals = torch.empty(cdiv(rows, step) * tiles, batch, heads, dim, dtype=torch.float32, device=grad.device)
    _launch(backward_kernel, [last_contiguous(crossed), last_contiguous(grad), factors.contiguous(), out, totals], step)
    return totals.unflatten(0, (-1, tiles)).sum(1, dtype=torch.float64)


def _launch(kernel: object, tensors: list[Tensor], step: int) -> None:
    assert all(x.stride(-1) == 1 for x in tensors), "some are written in place"
    rows, batch, heads, dim = tensors[0].shape
    blocks = blocks_of("decay", dim, 4)
    enqueue(
        kernel,
        (cdiv(rows, step) * cdiv(step, blocks.rows) * batch * heads, 1, 1),
        tensors,
        (*(strides(x) for x in tensors), heads, rows, step),
        {"K": dim, "BLOCK_K": padded(dim), "ROWS": blocks.rows},
        num_warps=blocks.warps,
    )
