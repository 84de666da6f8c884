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
    rows,
    step,
    R,
    S,
    REVERSE: tl.constexpr,
    OTHERS: tl.constexpr,
    PRODUCT: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
):
    """[ROWS, BLOCK_K] sums from a piece's first row up to each, or (REVERSE) from each to its last; OTHERS: without its own."""
    i, i_k = tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    tiles = (step + ROWS - 1) // ROWS
    i_piece = i_tile // tiles
    i_m = i_piece * step + i_tile % tiles * ROWS + i
    end = tl.minimum(rows, (i_piece + 1) * step)
    if OTHERS:  # those of the row beside, so that nothing is subtracted
        i_m = tl.where(i == (ROWS - 1 if REVERSE else 0), end, i_m + (1 if REVERSE else -1))
    p_x += i_b * strides_x[1]
    p_y += i_b * strides_y[1]
    x = summand(p_x, p_y, strides_x, strides_y, i_h, i_m, end, R, S, PRODUCT, K, BLOCK_K)
    p_totals += i_b * strides_totals[1] + i_h * strides_totals[2] + i_k[None, :]
    carry = tl.zeros([BLOCK_K], tl.float64)
    begin, last = (i_tile + 1, (i_piece + 1) * tiles) if REVERSE else (i_piece * tiles, i_tile)
    for first in range(begin, last, 32):
        i_t = first + tl.arange(0, 32)
        seen = (i_t < last)[:, None] & (i_k < K)[None, :]
        carry += tl.sum(
            tl.load(p_totals + i_t.to(tl.int64)[:, None] * strides_totals[0], mask=seen, other=0.0).to(tl.float64), 0
        )
    return tl.cumsum(x, 0, reverse=REVERSE) + carry.to(tl.float32)[None, :]


@triton.jit
def place(rows, step, H, ROWS: tl.constexpr):
    """(tile, batch, head, its rows, where its piece ends): program b * H + h of each tile of each piece of `step` rows."""
    tiles = (step + ROWS - 1) // ROWS
    heads = tl.num_programs(0) // ((rows + step - 1) // step * tiles)
    i_tile, i_head = tl.program_id(0) // heads, (tl.program_id(0) % heads).to(tl.int64)
    i_m = i_tile // tiles * step + i_tile % tiles * ROWS + tl.arange(0, ROWS)
    return i_tile, i_head // H, i_head % H, i_m, tl.minimum(rows, (i_tile // tiles + 1) * step)


@triton.jit(repr=lambda _: "wall_decay_totals", do_not_specialize=["rows", "step"])
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
    step,
    PRODUCT: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The sum of each tile's rows."""
    i_tile, i_b, i_h, i_m, end = place(rows, step, H, ROWS)
    i_k = tl.arange(0, BLOCK_K)
    p_x += i_b * strides_x[1]
    p_y += i_b * strides_y[1]
    x = summand(p_x, p_y, strides_x, strides_y, i_h, i_m, end, R, S, PRODUCT, K, BLOCK_K)
    p_totals += i_tile.to(tl.int64) * strides_totals[0] + i_b * strides_totals[1] + i_h * strides_totals[2]
    tl.store(p_totals + i_k, tl.sum(x, 0), mask=i_k < K)


@triton.jit(repr=lambda _: "wall_decay", do_not_specialize=["rows", "step"])
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
    step,
    AFTER: tl.constexpr,
    ADD: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Heads are the gates': R heads of the output have the gates of one, S the rows of one."""
    i_tile, i_b, i_h, i_m, end = place(rows, step, H, ROWS)
    exponent = summed(
        p_gate, p_gate, p_totals, strides_gate, strides_gate, strides_totals, i_b, i_h, i_tile, rows, step, R, S,
        AFTER, AFTER, False, K, BLOCK_K, ROWS,
    )  # fmt: skip
    factor = tl.exp(exponent)
    for i_of_group in range(R):
        i_x = i_h * R + i_of_group
        x = tile(p_x + i_b * strides_x[1] + i_x // S * strides_x[2], strides_x[0], i_m, end, K, BLOCK_K) * factor
        p_head = p_out + i_b * strides_out[1] + i_x * strides_out[2]
        if ADD:
            x += tile(p_head, strides_out[0], i_m, end, K, BLOCK_K)
        put(p_head, strides_out[0], i_m, end, x, K, BLOCK_K)


@triton.jit(repr=lambda _: "wall_decay_backward", do_not_specialize=["rows", "step"])
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
    step,
    AFTER: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Likewise: the sums the other way round, which it adds."""
    i_tile, i_b, i_h, i_m, end = place(rows, step, H, ROWS)
    found = summed(
        p_x, p_y, p_totals, strides_x, strides_y, strides_totals, i_b, i_h, i_tile, rows, step, R, S,
        not AFTER, AFTER, True, K, BLOCK_K, ROWS,
    )  # fmt: skip
    p_out += i_b * strides_out[1] + i_h * strides_out[2]
    put(p_out, strides_out[0], i_m, end, tile(p_out, strides_out[0], i_m, end, K, BLOCK_K) + found, K, BLOCK_K)


def tile_sums(gate: Tensor, step: int) -> Tensor:
    """See `megatron_lighthouse.wall.decay`."""
    gate = last_contiguous(gate)
    return _totals(gate, gate, gate.shape[2], (1, 1), step, False)


def decay(out: Tensor, x: Tensor, gate: Tensor, tile_sums: Tensor, after: bool, step: int, add: bool = False) -> None:
    """Likewise."""
    x, gate = last_contiguous(x), last_contiguous(gate)
    heads, most = gate.shape[2], out.shape[2]
    ratios = (most // heads, most // x.shape[2])
    _launch(decay_kernel, [x, gate, tile_sums.flatten(0, 1), out], heads, ratios, step, {"AFTER": after, "ADD": add})


def decay_backward(out: Tensor, x: Tensor, y: Tensor, after: bool, step: int) -> None:
    """Likewise."""
    x, y = last_contiguous(x), last_contiguous(y)
    heads = out.shape[2]
    ratios = (y.shape[2] // heads, y.shape[2] // x.shape[2])
    totals = _totals(x, y, heads, ratios, step, True)
    _launch(backward_kernel, [x, y, totals.flatten(0, 1), out], heads, ratios, step, {"AFTER": after})


def _totals(x: Tensor, y: Tensor, heads: int, ratios: tuple[int, int], step: int, product: bool) -> Tensor:
    """[pieces, tiles, B, heads, K] fp32."""
    counts = cdiv(len(y), step), cdiv(step, blocks_of("decay", y.shape[3], 4).rows)
    totals = torch.empty(*counts, y.shape[1], heads, y.shape[3], dtype=torch.float32, device=y.device)
    _launch(totals_kernel, [x, y, totals.flatten(0, 1)], heads, ratios, step, {"PRODUCT": product})
    return totals


def _launch(
    kernel: object, tensors: list[Tensor], heads: int, ratios: tuple[int, int], step: int, own: dict[str, bool]
) -> None:
    assert tensors[-1].stride(-1) == 1, "it is written in place"
    rows, batch, _, dim = tensors[1].shape
    blocks = blocks_of("decay", dim, 4)
    enqueue(
        kernel,
        (cdiv(rows, step) * cdiv(step, blocks.rows) * batch * heads, 1, 1),
        tensors,
        (*(strides(x) for x in tensors), heads, *ratios, rows, step),
        {**own, "K": dim, "BLOCK_K": padded(dim), "ROWS": blocks.rows},
        num_warps=blocks.warps,
    )
