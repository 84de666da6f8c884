"""Halves of a chunk that meet at anchors, of all sizes at once: `megatron_lighthouse.wall.decay`. Back: `halving_backward`.

A program has a tile of rows of a piece. With 2^l pieces to a half, its piece lies in a later or an earlier one; its row there
is decayed within the piece by the tile, to the half's anchor by the sums of the pieces between.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lighthouse.kernels.launch import cdiv, enqueue, last_contiguous, strides
from megatron_lighthouse.kernels.wall.decays import place
from megatron_lighthouse.kernels.wall.tiles import blocks_of, bounded, channels_of, from_first, parts, rows_of, to_last
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
def added_up(p_sums, stride, begin, end, i_k, K: tl.constexpr):
    """[CHANNELS] fp64: the sums numbered begin..end - 1 together."""
    total = tl.zeros([i_k.shape[0]], tl.float64)
    for first in range(begin, end, 16):
        i = first + tl.arange(0, 16)
        total += tl.sum(read(p_sums, stride, i, i < end, i_k, K).to(tl.float64), 0)
    return total


@triton.jit
def half_of(i_piece, pieces, half, rows, LATER: tl.constexpr):
    """(its half, whether that is a later (or an earlier) one of two, rows in such halves) for halves of so many pieces."""
    i_half = i_piece // pieces
    blocks, rest = rows // (2 * half), rows % (2 * half)
    if LATER:
        meets = i_half % 2 == 1
        there = blocks * half + tl.maximum(rest - half, 0)
    else:
        meets = (i_half % 2 == 0) & ((i_half + 1) * half < rows)
        there = (blocks + (rest > half).to(tl.int32)) * half
    return i_half, meets, there


@triton.jit
def exponents(p_gate, stride, p_tile_sums, stride_tile_sums, i_tile, i_m, m_row, rows, step, i_k, dtype: tl.constexpr,
              K: tl.constexpr, POWER: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """[ROWS, CHANNELS] sums of gates from the piece's first row up to each, and of those after each row of the piece."""
    tiles = (step + ROWS - 1) // ROWS
    g = parts(bounded(read(p_gate, stride, i_m, m_row, i_k, K)), dtype)
    before = added_up(p_tile_sums, stride_tile_sums, i_tile // tiles * tiles, i_tile, i_k, K).to(tl.float32)
    after = added_up(p_tile_sums, stride_tile_sums, i_tile + 1, (i_tile // tiles + 1) * tiles, i_k, K).to(tl.float32)
    return from_first(g, POWER, ROWS) + before[None, :], to_last(g, POWER, ROWS) + after[None, :]


@triton.jit
def put_halves(p_out, stride, x, p_piece_sums, stride_piece_sums, i_piece, i_m, m_row, rows, step, i_k,
               LATER: tl.constexpr, K: tl.constexpr):  # fmt: skip
    """Write rows, decayed within their piece, decayed to the anchor of each half that they lie in."""
    half, pieces, at, known = step, 1, 0, i_piece
    between = tl.zeros([i_k.shape[0]], tl.float64)
    while half < rows:
        i_half, meets, there = half_of(i_piece, pieces, half, rows, LATER)
        if meets:
            if LATER:
                between += added_up(p_piece_sums, stride_piece_sums, i_half * pieces, known, i_k, K)
                known = i_half * pieces
            else:
                between += added_up(p_piece_sums, stride_piece_sums, known + 1, (i_half + 1) * pieces, i_k, K)
                known = (i_half + 1) * pieces - 1
            i_row = at + i_half // 2 * half + i_m - i_half * half
            write(p_out, stride, i_row, m_row, x * tl.exp(between.to(tl.float32))[None, :], i_k, K)
        at += there
        half *= 2
        pieces *= 2


@triton.jit(repr=lambda _: "wall_halves", do_not_specialize=["rows", "step"])
def halves_kernel(
    p_q,
    p_k,
    p_gate,
    p_tile_sums,
    p_piece_sums,
    p_near,
    p_far,
    strides_q,
    strides_k,
    strides_gate,
    strides_tile_sums,
    strides_piece_sums,
    strides_near,
    strides_far,
    H,
    R,
    S,
    rows,
    step,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    POWER: tl.constexpr,
):
    """Program (b * H + h, of a gate's head, of each tile; some channels). R heads of queries share a gate, S gates a key."""
    i_tile, i_b, i_h, i_m, end = place(rows, step, H, ROWS)
    i_piece, i_k, m_row = i_tile // ((step + ROWS - 1) // ROWS), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS), i_m < end
    p_piece_sums += i_b * strides_piece_sums[1] + i_h * strides_piece_sums[2]
    before, after = exponents(
        p_gate + i_b * strides_gate[1] + i_h * strides_gate[2], strides_gate[0],
        p_tile_sums + i_b * strides_tile_sums[1] + i_h * strides_tile_sums[2], strides_tile_sums[0],
        i_tile, i_m, m_row, rows, step, i_k, p_q.dtype.element_ty, K, POWER, ROWS,
    )  # fmt: skip
    for i_q in range(i_h * R, i_h * R + R):
        q = read(p_q + i_b * strides_q[1] + i_q * strides_q[2], strides_q[0], i_m, m_row, i_k, K) * tl.exp(before)
        put_halves(
            p_near + i_b * strides_near[1] + i_q * strides_near[2], strides_near[0], q, p_piece_sums, strides_piece_sums[0],
            i_piece, i_m, m_row, rows, step, i_k, True, K,
        )  # fmt: skip
    k = read(p_k + i_b * strides_k[1] + i_h // S * strides_k[2], strides_k[0], i_m, m_row, i_k, K) * tl.exp(after)
    put_halves(
        p_far + i_b * strides_far[1] + i_h * strides_far[2], strides_far[0], k, p_piece_sums, strides_piece_sums[0],
        i_piece, i_m, m_row, rows, step, i_k, False, K,
    )  # fmt: skip


def halves(query: Tensor, key: Tensor, gate: Tensor, tile_sums: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """See `megatron_lighthouse.wall.decay`."""
    later, earlier = rows_of_halves(len(query), step)
    near = torch.empty(later, *query.shape[1:], dtype=query.dtype, device=query.device)
    far = torch.empty(earlier, *gate.shape[1:], dtype=key.dtype, device=key.device)
    given = [*map(last_contiguous, (query, key, gate)), *sums_of(tile_sums)]
    launch(halves_kernel, [*given, near, far], gate, ratios_of(query, key, gate), step, power=True)
    return near, far


def sums_of(tile_sums: Tensor) -> tuple[Tensor, Tensor]:
    """[tiles, B, heads, K] of tiles, and of pieces in float64."""
    return tile_sums.flatten(0, 1), tile_sums.sum(1, dtype=torch.float64)


def ratios_of(query: Tensor, key: Tensor, gate: Tensor) -> tuple[int, int]:
    """Heads of queries to one of gates, and of gates to one of keys."""
    return query.shape[2] // gate.shape[2], gate.shape[2] // key.shape[2]


def launch(
    kernel: object, tensors: list[Tensor], like: Tensor, ratios: tuple[int, ...], step: int, *counts: int, power: bool = False
) -> None:
    """Programs of each tile, batch and head of `like`, and some channels; `power`: of a kernel that sums gates within tiles."""
    assert all(x.stride(-1) == 1 for x in tensors), "some are written in place"
    rows, batch, heads, dim = like.shape
    blocks = blocks_of("decay", dim, 4)
    enqueue(
        kernel,
        (cdiv(rows, step) * cdiv(step, blocks.rows) * batch * heads, cdiv(dim, channels_of(dim)), 1),
        tensors,
        (*(strides(x) for x in tensors), heads, *ratios, rows, step, *counts),
        constants_of(dim, blocks.rows, power),
        **how_of(power),
    )


def how_of(power: bool) -> dict[str, int]:
    """Of such a kernel: for what it holds more warps, of so few registers that two of its programs run at a time."""
    return {"num_warps": 8, "maxnreg": 128} if power else {"num_warps": 4}


def constants_of(dim: int, rows: int, power: bool) -> dict[str, int]:
    """In the kernels' order; `power`: of those that sum gates within tiles."""
    return {"K": dim, "CHANNELS": channels_of(dim), **(rows_of(rows) if power else {"ROWS": rows})}
