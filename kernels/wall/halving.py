"""Halves of a chunk that meet at anchors, of all sizes at once: `megatron_lighthouse.wall.decay`. Back: `halving_backward`.

A program has a tile of rows of a piece. With 2^l pieces to a half, its piece lies in a later or an earlier one; its row there
is decayed within the tile by the program, and between the tile and the half's anchor by a factor of `halving_sums`. No size
waits for another, and what is read from far is asked for first: the loops over sizes are unrolled.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lighthouse.kernels.launch import cdiv, enqueue, last_contiguous, strides
from megatron_lighthouse.kernels.wall.decays import place
from megatron_lighthouse.kernels.wall.halving_sums import sizes_of, sums_beside
from megatron_lighthouse.kernels.wall.tiles import blocks_of, bounded, channels_of
from megatron_lighthouse.wall.cut import rows_of_halves


@triton.jit
def read(p_x, stride, i_row, m_row, i_k, K: tl.constexpr):
    """[rows, CHANNELS]; 0 where m_row is not."""
    return tl.load(
        p_x + i_row.to(tl.int64)[:, None] * stride + i_k[None, :], mask=m_row[:, None] & (i_k < K)[None, :], other=0.0
    )


@triton.jit
def write(p_x, stride, i_row, m_row, x, i_k, K: tl.constexpr):
    """The way back."""
    p_x += i_row.to(tl.int64)[:, None] * stride + i_k[None, :]
    tl.store(p_x, x.to(p_x.dtype.element_ty), mask=m_row[:, None] & (i_k < K)[None, :])


@triton.jit
def halves_of(i_piece, rows, step, SIZES: tl.constexpr):
    """Of each size: whether the piece's half is a later one, whether that meets another, and what takes its rows in the chunk
    to those among all later, or all earlier, halves."""
    later, meets, begins, near, far, pieces = (), (), (), 0, 0, rows // step
    for l in tl.static_range(SIZES):
        half, i_half, blocks = step << l, i_piece >> l, pieces >> (l + 1)
        rest = rows - blocks * 2 * half
        later += (i_half % 2 == 1,)
        meets += ((i_half % 2 == 1) | ((i_half + 1) * half < rows),)
        begins += (tl.where(i_half % 2 == 1, near, far) + i_half // 2 * half - i_half * half,)
        near += blocks * half + tl.maximum(rest - half, 0)
        far += (blocks + (rest > half).to(tl.int32)) * half
    return later, meets, begins


@triton.jit
def decays_of(p_gate, stride, i_m, end, i_k, K: tl.constexpr):
    """[ROWS, CHANNELS] from the tile's first row up to each, and from each to the tile's end: nothing is a difference."""
    g = bounded(read(p_gate, stride, i_m, i_m < end, i_k, K))
    last = tl.arange(0, i_m.shape[0]) == i_m.shape[0] - 1
    after = bounded(read(p_gate, stride, i_m + 1, (i_m + 1 < end) & ~last, i_k, K))
    return tl.exp(tl.cumsum(g, 0)), tl.exp(tl.cumsum(after, 0, reverse=True))


@triton.jit
def factor_of(p_factors, stride, i_tile, i_k, K: tl.constexpr):
    """[1, CHANNELS], by which the tile's rows are multiplied."""
    return tl.load(p_factors + i_tile.to(tl.int64) * stride + i_k, mask=i_k < K, other=0.0)[None, :]


@triton.jit(repr=lambda _: "wall_halves", do_not_specialize=["rows", "step"])
def halves_kernel(
    p_q,
    p_k,
    p_gate,
    p_factors,
    p_near,
    p_far,
    strides_q,
    strides_k,
    strides_gate,
    strides_factors,
    strides_near,
    strides_far,
    H,
    R,
    S,
    rows,
    step,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIZES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Program (b * H + h, of a gate's head, of each tile; some channels). R heads of queries share a gate, S gates a key."""
    i_tile, i_b, i_h, i_m, end = place(rows, step, H, ROWS)
    tiles = (step + ROWS - 1) // ROWS
    all_tiles = (rows + step - 1) // step * tiles
    i_k, m_row = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS), i_m < end
    later, meets, begins = halves_of(i_tile // tiles, rows, step, SIZES)
    p_factors += i_b * strides_factors[1] + i_h * strides_factors[2]
    p_far += i_b * strides_far[1] + i_h * strides_far[2]
    k = read(p_k + i_b * strides_k[1] + i_h // S * strides_k[2], strides_k[0], i_m, m_row, i_k, K)
    p_gate += i_b * strides_gate[1] + i_h * strides_gate[2]
    for i in range(R):
        i_q = i_h * R + i
        q = read(p_q + i_b * strides_q[1] + i_q * strides_q[2], strides_q[0], i_m, m_row, i_k, K)
        before, after = decays_of(p_gate, strides_gate[0], i_m, end, i_k, K)
        p_near_q = p_near + i_b * strides_near[1] + i_q * strides_near[2]
        x_q, x_k = q * before, k * after
        for l in tl.static_range(SIZES):
            x = tl.where(later[l], x_q, x_k) * factor_of(p_factors, strides_factors[0], l * all_tiles + i_tile, i_k, K)
            p_out = tl.where(later[l], p_near_q, p_far)
            stride = tl.where(later[l], strides_near[0], strides_far[0])
            write(p_out, stride, begins[l] + i_m, m_row & meets[l] & (later[l] | (i == 0)), x, i_k, K)


def halves(query: Tensor, key: Tensor, gate: Tensor, tile_sums: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """See `megatron_lighthouse.wall.decay`."""
    later, earlier = rows_of_halves(len(query), step)
    near = torch.empty(later, *query.shape[1:], dtype=query.dtype, device=query.device)
    far = torch.empty(earlier, *gate.shape[1:], dtype=key.dtype, device=key.device)
    given = [*map(last_contiguous, (query, key, gate)), factors_by(tile_sums, gate, step)]
    launch(halves_kernel, [*given, near, far], gate, ratios_of(query, key, gate), step)
    return near, far


def factors_by(tile_sums: Tensor, gate: Tensor, step: int) -> Tensor:
    """[sizes * tiles, B, heads, K] fp32: what rows keep between their tile and the anchor of its half of each size."""
    return sums_beside(tile_sums.flatten(0, 1), gate, 1, step, factors=True)


def ratios_of(query: Tensor, key: Tensor, gate: Tensor) -> tuple[int, int]:
    """Heads of queries to one of gates, and of gates to one of keys."""
    return query.shape[2] // gate.shape[2], gate.shape[2] // key.shape[2]


def launch(kernel: object, tensors: list[Tensor], like: Tensor, ratios: tuple[int, ...], step: int) -> None:
    """Programs of each tile, batch and head of `like`, and some channels."""
    assert all(x.stride(-1) == 1 for x in tensors), "some are written in place"
    rows, batch, heads, dim = like.shape
    blocks = blocks_of("decay", dim, 4)
    enqueue(
        kernel,
        (cdiv(rows, step) * cdiv(step, blocks.rows) * batch * heads, cdiv(dim, channels_of(dim)), 1),
        tensors,
        (*(strides(x) for x in tensors), heads, *ratios, rows, step),
        constants_of(dim, sizes_of(rows, step)),
        num_warps=blocks.warps,
    )


def constants_of(dim: int, sizes: int) -> dict[str, int]:
    """In the kernels' order."""
    return {"K": dim, "CHANNELS": channels_of(dim), "SIZES": sizes, "ROWS": blocks_of("decay", dim, 4).rows}
