"""Rows times exponentials of sums of gates from or to an anchor, and the gates' gradients: `megatron_lighthouse.wall.decay`.

Within tiles sums are fp32, between them fp64: a program adds up what the tiles before or after its own come to.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lighthouse.kernels.launch import cdiv, enqueue, last_contiguous, padded, strides
from megatron_lighthouse.kernels.parallax.tiles import put, tile
from megatron_lighthouse.kernels.wall.tiles import blocks_of


@triton.jit
def summand(
    p_x,
    p_y,
    strides_x,
    strides_y,
    i_h,
    i_m,
    rows,
    R,
    S,
    PRODUCT: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[ROWS, BLOCK_K] fp32: rows of x, or the sum of x y over the R heads of y; S of these share one of x."""
    if PRODUCT:
        total = tl.zeros([i_m.shape[0], BLOCK_K], tl.float32)
        for i_of_group in range(R):
            i_y = i_h * R + i_of_group
            x = tile(p_x + i_y // S * strides_x[2], strides_x[0], i_m, rows, K, BLOCK_K).to(tl.float32)
            total += x * tile(p_y + i_y * strides_y[2], strides_y[0], i_m, rows, K, BLOCK_K).to(tl.float32)
    else:
        total = tile(p_x + i_h * strides_x[2], strides_x[0], i_m, rows, K, BLOCK_K).to(tl.float32)
    return total


@triton.jit
def summed(
    p_x,
    p_y,
    p_totals,
    strides_x,
    strides_y,
    strides_totals,
    i_b,
    i_h,
    i_tile,
    tiles,
    rows,
    R,
    S,
    REVERSE: tl.constexpr,
    OTHERS: tl.constexpr,
    PRODUCT: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
):
    """[ROWS, BLOCK_K] sums from the first row up to each, or (REVERSE) from each to the last; OTHERS: without its own."""
    i, i_k = tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    i_m = i_tile * ROWS + i
    if OTHERS:  # those of the row beside, so that nothing is subtracted
        i_m += 1 if REVERSE else -1
        own = i_m // ROWS == i_tile
        i_m = tl.where(own & (i_m >= 0), i_m, rows)
    p_x += i_b * strides_x[1]
    p_y += i_b * strides_y[1]
    x = summand(p_x, p_y, strides_x, strides_y, i_h, i_m, rows, R, S, PRODUCT, K, BLOCK_K)
    p_totals += i_b * strides_totals[1] + i_h * strides_totals[2] + i_k[None, :]
    carry = tl.zeros([BLOCK_K], tl.float64)
    begin, end = (i_tile + 1, tiles) if REVERSE else (0, i_tile)
    for first in range(begin, end, 32):
        i_t = first + tl.arange(0, 32)
        seen = (i_t < end)[:, None] & (i_k < K)[None, :]
        carry += tl.sum(
            tl.load(p_totals + i_t.to(tl.int64)[:, None] * strides_totals[0], mask=seen, other=0.0).to(tl.float64), 0
        )
    return tl.cumsum(x, 0, reverse=REVERSE) + carry.to(tl.float32)[None, :]


@triton.jit(repr=lambda _: "wall_decay_totals", do_not_specialize=["rows"])
def totals_kernel(
    p_x,
    p_y,
    p_totals,
    strides_x,
    strides_y,
    strides_totals,
    H,
    R,
    S,
    rows,
    PRODUCT: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Program b * H + h of each tile: the sum of its rows."""
    heads = tl.num_programs(0) // ((rows + ROWS - 1) // ROWS)
    i_tile, i_head = tl.program_id(0) // heads, (tl.program_id(0) % heads).to(tl.int64)
    i_b, i_h = i_head // H, i_head % H
    i_m, i_k = i_tile * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    p_x += i_b * strides_x[1]
    p_y += i_b * strides_y[1]
    x = summand(p_x, p_y, strides_x, strides_y, i_h, i_m, rows, R, S, PRODUCT, K, BLOCK_K)
    p_totals += i_tile.to(tl.int64) * strides_totals[0] + i_b * strides_totals[1] + i_h * strides_totals[2]
    tl.store(p_totals + i_k, tl.sum(x, 0), mask=i_k < K)


@triton.jit(repr=lambda _: "wall_decay", do_not_specialize=["rows"])
def decay_kernel(
    p_x,
    p_gate,
    p_totals,
    p_out,
    strides_x,
    strides_gate,
    strides_totals,
    strides_out,
    H,
    R,
    S,
    rows,
    AFTER: tl.constexpr,
    ADD: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Program b * H + h of each tile, for the gates' heads: R heads of the output have the gates of one, S the rows of one."""
    tiles = (rows + ROWS - 1) // ROWS
    heads = tl.num_programs(0) // tiles
    i_tile, i_head = tl.program_id(0) // heads, (tl.program_id(0) % heads).to(tl.int64)
    i_b, i_h = i_head // H, i_head % H
    exponent = summed(
        p_gate, p_gate, p_totals, strides_gate, strides_gate, strides_totals, i_b, i_h, i_tile, tiles, rows, R, S,
        AFTER, AFTER, False, K, BLOCK_K, ROWS,
    )  # fmt: skip
    factor, i_m = tl.exp(exponent), i_tile * ROWS + tl.arange(0, ROWS)
    for i_of_group in range(R):
        i_x = i_h * R + i_of_group
        x = tile(p_x + i_b * strides_x[1] + i_x // S * strides_x[2], strides_x[0], i_m, rows, K, BLOCK_K) * factor
        p_head = p_out + i_b * strides_out[1] + i_x * strides_out[2]
        if ADD:
            x += tile(p_head, strides_out[0], i_m, rows, K, BLOCK_K)
        put(p_head, strides_out[0], i_m, rows, x, K, BLOCK_K)


@triton.jit(repr=lambda _: "wall_decay_backward", do_not_specialize=["rows"])
def backward_kernel(
    p_x,
    p_y,
    p_totals,
    p_out,
    strides_x,
    strides_y,
    strides_totals,
    strides_out,
    H,
    R,
    S,
    rows,
    AFTER: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Likewise: the sums the other way round."""
    tiles = (rows + ROWS - 1) // ROWS
    heads = tl.num_programs(0) // tiles
    i_tile, i_head = tl.program_id(0) // heads, (tl.program_id(0) % heads).to(tl.int64)
    i_b, i_h = i_head // H, i_head % H
    found = summed(
        p_x, p_y, p_totals, strides_x, strides_y, strides_totals, i_b, i_h, i_tile, tiles, rows, R, S,
        not AFTER, AFTER, True, K, BLOCK_K, ROWS,
    )  # fmt: skip
    i_m = i_tile * ROWS + tl.arange(0, ROWS)
    put(p_out + i_b * strides_out[1] + i_h * strides_out[2], strides_out[0], i_m, rows, found, K, BLOCK_K)


def decay(x: Tensor, gate: Tensor, after: bool, dtype: torch.dtype | None = None) -> Tensor:
    """See `megatron_lighthouse.wall.decay`."""
    out = torch.empty(*x.shape[:2], max(x.shape[2], gate.shape[2]), x.shape[3], dtype=dtype or x.dtype, device=x.device)
    return _decay(out, x, gate, after, False)


def add_decayed(out: Tensor, x: Tensor, gate: Tensor, after: bool) -> None:
    """Likewise."""
    _decay(out, x, gate, after, True)


def decay_backward(x: Tensor, y: Tensor, heads: int, after: bool) -> Tensor:
    """Likewise."""
    x, y = last_contiguous(x), last_contiguous(y)
    rows, batch, _, dim = y.shape
    ratios = (y.shape[2] // heads, y.shape[2] // x.shape[2])
    totals = _totals(x, y, heads, ratios, True)
    out = torch.empty(rows, batch, heads, dim, dtype=torch.float32, device=y.device)
    _launch(backward_kernel, [x, y, totals, out], heads, ratios, {"AFTER": after})
    return out


def _decay(out: Tensor, x: Tensor, gate: Tensor, after: bool, add: bool) -> Tensor:
    x, gate = last_contiguous(x), last_contiguous(gate)
    heads, most = gate.shape[2], max(x.shape[2], gate.shape[2])
    ratios = (most // heads, most // x.shape[2])
    totals = _totals(gate, gate, heads, ratios, False)
    _launch(decay_kernel, [x, gate, totals, out], heads, ratios, {"AFTER": after, "ADD": add})
    return out


def _totals(x: Tensor, y: Tensor, heads: int, ratios: tuple[int, int], product: bool) -> Tensor:
    """[tiles, B, heads, K] fp32."""
    tiles = cdiv(len(y), blocks_of("decay", y.shape[3], 4).rows)
    totals = torch.empty(tiles, y.shape[1], heads, y.shape[3], dtype=torch.float32, device=y.device)
    _launch(totals_kernel, [x, y, totals], heads, ratios, {"PRODUCT": product})
    return totals


def _launch(kernel: object, tensors: list[Tensor], heads: int, ratios: tuple[int, int], own: dict[str, bool]) -> None:
    rows, batch, _, dim = tensors[1].shape
    blocks = blocks_of("decay", dim, 4)
    enqueue(
        kernel,
        (cdiv(rows, blocks.rows) * batch * heads, 1, 1),
        tensors,
        (*(strides(x) for x in tensors), heads, *ratios, rows),
        {**own, "K": dim, "BLOCK_K": padded(dim), "ROWS": blocks.rows},
        varying=1,
        num_warps=blocks.warps,
    )
