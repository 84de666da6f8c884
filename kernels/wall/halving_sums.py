"""What a half's other tiles come to, of all sizes of halves at once: the factors of `halving`, and its way back.

A program walks the tiles of a half outward from its anchor, or towards it, so that no sum is a difference. Ours.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lighthouse.kernels.launch import cdiv, enqueue, strides
from megatron_lighthouse.kernels.wall.tiles import blocks_of, channels_of


@triton.jit
def of_tiles(p_x, strides_x, i_tile, m_tile, heads, i_k, K: tl.constexpr):
    """[tiles, CHANNELS] of some heads together."""
    found = tl.zeros([i_tile.shape[0], i_k.shape[0]], tl.float32)
    for i_head in range(heads):
        p_tile = p_x + i_head * strides_x[2] + i_tile.to(tl.int64)[:, None] * strides_x[0] + i_k[None, :]
        found += tl.load(p_tile, mask=m_tile[:, None] & (i_k < K)[None, :], other=0.0)
    return found


@triton.jit(repr=lambda _: "wall_halves_sums", do_not_specialize=["rows", "step"])
def sums_kernel(
    p_totals,
    p_sums,
    strides_totals,
    strides_sums,
    H,
    R,
    rows,
    step,
    FACTORS: tl.constexpr,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Program (b * H + h and some channels, half, size): of each tile of a later half the sum of those after it, of R heads,
    and of an earlier one's of those before it. FACTORS: exp of the sum of those between it and the anchor, of gates.
    """
    i_half, i_size, blocks = tl.program_id(1), tl.program_id(2), (K + CHANNELS - 1) // CHANNELS
    i_head, i_k = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    i_b, i_h = i_head // H, i_head % H
    tiles = (step + ROWS - 1) // ROWS
    all_tiles = (rows + step - 1) // step * tiles
    begin = i_half * (tiles << i_size)
    count = tl.minimum(all_tiles - begin, tiles << i_size)
    later = i_half % 2 == 1
    meets = later | ((i_half + 1) * (step << i_size) < rows)
    heads = tl.where(later, R, 1)
    p_totals += i_b * strides_totals[1] + i_h * R * strides_totals[2]
    p_sums += i_b * strides_sums[1] + i_h * strides_sums[2]
    if FACTORS:
        sign, given = tl.where(later, 1, -1), 0
    else:
        sign, given = tl.where(later, -1, 1), i_size * all_tiles
    first = begin + tl.where(sign > 0, 0, count - 1)
    i, carry = tl.arange(0, 32), tl.zeros([CHANNELS], tl.float64)
    for done in range(0, count, 32):
        i_tile, there = first + sign * (done + i), (done + i < count) & meets
        beside = of_tiles(p_totals, strides_totals, given + i_tile - sign, there & (i > 0), heads, i_k, K)
        sums = tl.cumsum(beside, 0) + carry.to(tl.float32)[None, :]  # without its own, so that nothing is subtracted
        own = of_tiles(p_totals, strides_totals, given + i_tile, there, heads, i_k, K)
        carry += tl.sum(own.to(tl.float64), 0)
        p_tile = p_sums + (i_size * all_tiles + i_tile).to(tl.int64)[:, None] * strides_sums[0] + i_k[None, :]
        found = tl.exp(sums) if FACTORS else sums
        tl.store(p_tile, found, mask=(done + i < count)[:, None] & (i_k < K)[None, :])


def sums_beside(x: Tensor, gate: Tensor, ratio: int, step: int, factors: bool = False) -> Tensor:
    """[sizes * tiles, B, heads, K] fp32, of a gate's heads.

    Args:
        x: of each size and tile, of `ratio` times as many heads where halves are later; with `factors` of each tile.
    """
    rows, batch, heads, dim = gate.shape
    pieces, tile = cdiv(rows, step), blocks_of("decay", dim, 4).rows
    sizes = sizes_of(rows, step)
    sums = torch.empty(sizes * pieces * cdiv(step, tile), batch, heads, dim, dtype=torch.float32, device=x.device)
    enqueue(
        sums_kernel,
        (batch * heads * cdiv(dim, channels_of(dim)), pieces, sizes),
        [x, sums],
        (strides(x), strides(sums), heads, ratio, rows, step),
        {"FACTORS": factors, "K": dim, "CHANNELS": channels_of(dim), "ROWS": tile},
        num_warps=1,
    )
    return sums


def sizes_of(rows: int, step: int) -> int:
    """How many sizes of halves there are: of 1, 2, 4 … pieces."""
    return (cdiv(rows, step) - 1).bit_length()
