"""The gradients of halves that meet, in three steps: by a tile's own rows, what tiles give to others, and that added.

A gate's gradient is the sum over the queries of its own row and those after it where it lies in a later half, and over the
keys before it in an earlier one: nothing is a difference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lighthouse.kernels.launch import cdiv, enqueue, last_contiguous, strides
from megatron_lighthouse.kernels.wall.decays import place
from megatron_lighthouse.kernels.wall.halving import added_up, exponents, half_of, launch, ratios_of, read, sums_of, write
from megatron_lighthouse.kernels.wall.tiles import added, blocks_of, channels_of, parts
from megatron_lighthouse.wall.decay import summed


@triton.jit
def of_halves(p_of, stride, x, p_totals, stride_totals, p_piece_sums, stride_piece_sums, i_piece, i_tile, i_m, m_row, rows,
              step, tiles, i_k, LATER: tl.constexpr, K: tl.constexpr):  # fmt: skip
    """The gradients of what `put_halves` wrote, decayed likewise, together; of each size of halves the tile's sum of x times
    these to totals."""
    half, pieces, at, known, i_size = step, 1, 0, i_piece, 0
    between, total = tl.zeros([i_k.shape[0]], tl.float64), tl.zeros([i_m.shape[0], i_k.shape[0]], tl.float32)
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
            grad = read(p_of, stride, i_row, m_row, i_k, K).to(tl.float32) * tl.exp(between.to(tl.float32))[None, :]
            p_total = p_totals + (i_size * tiles + i_tile).to(tl.int64) * stride_totals + i_k
            tl.store(p_total, tl.sum(x * grad, 0), mask=i_k < K)
            total += grad
        at += there
        half *= 2
        pieces *= 2
        i_size += 1
    return total


@triton.jit(repr=lambda _: "wall_halves_backward", do_not_specialize=["rows", "step"])
def backward_kernel(
    p_q,
    p_k,
    p_gate,
    p_tile_sums,
    p_piece_sums,
    p_of_near,
    p_of_far,
    p_dq,
    p_dk,
    p_dg,
    p_totals,
    strides_q,
    strides_k,
    strides_gate,
    strides_tile_sums,
    strides_piece_sums,
    strides_of_near,
    strides_of_far,
    strides_dq,
    strides_dk,
    strides_dg,
    strides_totals,
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
    """Likewise: adds to the gradients, of keys for each head of the gates, and of gates what the tile's own rows give."""
    i_tile, i_b, i_h, i_m, end = place(rows, step, H, ROWS)
    tiles_of_piece = (step + ROWS - 1) // ROWS
    tiles = (rows + step - 1) // step * tiles_of_piece
    i_piece, i_k, m_row = i_tile // tiles_of_piece, tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS), i_m < end
    i = tl.arange(0, ROWS)
    p_piece_sums += i_b * strides_piece_sums[1] + i_h * strides_piece_sums[2]
    p_totals += i_b * strides_totals[1]
    before, after = exponents(
        p_gate + i_b * strides_gate[1] + i_h * strides_gate[2], strides_gate[0],
        p_tile_sums + i_b * strides_tile_sums[1] + i_h * strides_tile_sums[2], strides_tile_sums[0],
        i_tile, i_m, m_row, rows, step, i_k, p_q.dtype.element_ty, K, POWER, ROWS,
    )  # fmt: skip
    decay = tl.exp(before)
    products = tl.zeros([ROWS, CHANNELS], tl.float32)
    for i_q in range(i_h * R, i_h * R + R):
        x = read(p_q + i_b * strides_q[1] + i_q * strides_q[2], strides_q[0], i_m, m_row, i_k, K) * decay
        grad = of_halves(
            p_of_near + i_b * strides_of_near[1] + i_q * strides_of_near[2], strides_of_near[0], x,
            p_totals + i_q * strides_totals[2], strides_totals[0], p_piece_sums, strides_piece_sums[0],
            i_piece, i_tile, i_m, m_row, rows, step, tiles, i_k, True, K,
        )  # fmt: skip
        products += x * grad
        p_head = p_dq + i_b * strides_dq[1] + i_q * strides_dq[2]
        write(p_head, strides_dq[0], i_m, m_row, read(p_head, strides_dq[0], i_m, m_row, i_k, K) + grad * decay, i_k, K)
    of_gate = added(i[:, None] <= i[None, :], parts(products, p_q.dtype.element_ty))
    decay = tl.exp(after)
    x = read(p_k + i_b * strides_k[1] + i_h // S * strides_k[2], strides_k[0], i_m, m_row, i_k, K) * decay
    grad = of_halves(
        p_of_far + i_b * strides_of_far[1] + i_h * strides_of_far[2], strides_of_far[0], x,
        p_totals + i_h * R * strides_totals[2], strides_totals[0], p_piece_sums, strides_piece_sums[0],
        i_piece, i_tile, i_m, m_row, rows, step, tiles, i_k, False, K,
    )  # fmt: skip
    of_gate += added(i[:, None] > i[None, :], parts(x * grad, p_q.dtype.element_ty))
    p_dk += i_b * strides_dk[1] + i_h * strides_dk[2]
    write(p_dk, strides_dk[0], i_m, m_row, read(p_dk, strides_dk[0], i_m, m_row, i_k, K) + grad * decay, i_k, K)
    p_dg += i_b * strides_dg[1] + i_h * strides_dg[2]
    write(p_dg, strides_dg[0], i_m, m_row, read(p_dg, strides_dg[0], i_m, m_row, i_k, K) + of_gate, i_k, K)


@triton.jit
def totals_of(p_totals, strides_totals, first, i_tile, m_tile, heads, i_k, K: tl.constexpr):
    """[tiles, CHANNELS] of some heads together."""
    found = tl.zeros([i_tile.shape[0], i_k.shape[0]], tl.float32)
    for i_head in range(heads):
        found += read(p_totals + i_head * strides_totals[2], strides_totals[0], first + i_tile, m_tile, i_k, K)
    return found


@triton.jit(repr=lambda _: "wall_halves_totals", do_not_specialize=["rows", "step"])
def totals_kernel(
    p_totals,
    p_sums,
    strides_totals,
    strides_sums,
    H,
    R,
    rows,
    step,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Program (b * H + h and some channels, half, size): of each tile what the half's later (or earlier) tiles come to."""
    i_half, i_size, blocks = tl.program_id(1), tl.program_id(2), (K + CHANNELS - 1) // CHANNELS
    i_head, i_k = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    i_b, i_h = i_head // H, i_head % H
    tiles = (step + ROWS - 1) // ROWS
    all_tiles = (rows + step - 1) // step * tiles
    begin = i_half * (tiles << i_size)
    count = tl.minimum(all_tiles - begin, tiles << i_size)
    later = i_half % 2 == 1
    meets = later | ((i_half + 1) * (step << i_size) < rows)
    p_totals += i_b * strides_totals[1] + i_h * R * strides_totals[2]
    p_sums += i_b * strides_sums[1] + i_h * strides_sums[2]
    heads = tl.where(later, R, 1)
    sign, first = tl.where(later, -1, 1), i_size * all_tiles + begin + tl.where(later, count - 1, 0)
    i, carry = tl.arange(0, 32), tl.zeros([CHANNELS], tl.float64)
    for done in range(0, count, 32):
        there = (done + i < count) & meets
        beside = totals_of(p_totals, strides_totals, first, sign * (done + i - 1), there & (i > 0), heads, i_k, K)
        sums = tl.cumsum(beside, 0) + carry.to(tl.float32)[None, :]  # without its own, so that nothing is subtracted
        write(p_sums, strides_sums[0], first + sign * (done + i), done + i < count, sums, i_k, K)
        own = totals_of(p_totals, strides_totals, first, sign * (done + i), there, heads, i_k, K)
        carry += tl.sum(own.to(tl.float64), 0)


@triton.jit(repr=lambda _: "wall_halves_gates", do_not_specialize=["rows", "step", "sizes"])
def gates_kernel(
    p_sums,
    p_dg,
    strides_sums,
    strides_dg,
    H,
    rows,
    step,
    sizes,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Adds what other tiles give to the gates' gradients. Programs as of `halves_kernel`."""
    i_tile, i_b, i_h, i_m, end = place(rows, step, H, ROWS)
    tiles, i_k = (rows + step - 1) // step * ((step + ROWS - 1) // ROWS), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    p_sums += i_b * strides_sums[1] + i_h * strides_sums[2] + i_k
    total = tl.zeros([CHANNELS], tl.float32)
    for i_size in range(sizes):
        total += tl.load(p_sums + (i_size * tiles + i_tile).to(tl.int64) * strides_sums[0], mask=i_k < K, other=0.0)
    p_dg += i_b * strides_dg[1] + i_h * strides_dg[2]
    write(p_dg, strides_dg[0], i_m, i_m < end, read(p_dg, strides_dg[0], i_m, i_m < end, i_k, K) + total[None, :], i_k, K)


@triton.jit(repr=lambda _: "wall_halves_values", do_not_specialize=["rows", "step"])
def values_kernel(
    p_of,
    p_dv,
    strides_of,
    strides_dv,
    H,
    rows,
    step,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Adds to the values' gradients those of the earlier halves. Likewise, of a value's head."""
    i_tile, i_b, i_h, i_m, end = place(rows, step, H, ROWS)
    i_piece, i_k, m_row = i_tile // ((step + ROWS - 1) // ROWS), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS), i_m < end
    p_of += i_b * strides_of[1] + i_h * strides_of[2]
    p_dv += i_b * strides_dv[1] + i_h * strides_dv[2]
    total = read(p_dv, strides_dv[0], i_m, m_row, i_k, K).to(tl.float32)
    half, pieces, at = step, 1, 0
    while half < rows:
        i_half, meets, there = half_of(i_piece, pieces, half, rows, False)
        i_row = at + i_half // 2 * half + i_m - i_half * half
        total += read(p_of, strides_of[0], i_row, m_row & meets, i_k, K).to(tl.float32)
        at += there
        half *= 2
        pieces *= 2
    write(p_dv, strides_dv[0], i_m, m_row, total, i_k, K)


def halves_backward(
    sums: Sequence[Tensor],
    grads: Sequence[Tensor],
    query: Tensor,
    key: Tensor,
    gate: Tensor,
    tile_sums: Tensor,
    step: int,
) -> None:
    """Likewise."""
    of_near, of_far, of_value = map(last_contiguous, grads)
    dq, dk, dv, dg = sums
    shared = gate.shape[2] != key.shape[2]
    of_key = torch.zeros_like(gate, memory_format=torch.contiguous_format) if shared else dk
    sizes, tiles = (len(tile_sums) - 1).bit_length(), tile_sums.flatten(0, 1)
    totals, of_tiles = (
        torch.empty(sizes * len(tiles), *x.shape[1:], dtype=torch.float32, device=x.device) for x in (query, gate)
    )
    given, ratios = [*map(last_contiguous, (query, key, gate)), *sums_of(tile_sums)], ratios_of(query, key, gate)
    launch(backward_kernel, [*given, of_near, of_far, dq, of_key, dg, totals], gate, ratios, step, power=True)
    _launch_totals(totals, of_tiles, gate, ratios[0], len(tile_sums), sizes, step)
    launch(gates_kernel, [of_tiles, dg], gate, (), step, sizes)
    launch(values_kernel, [of_value, dv], dv, (), step)
    if shared:
        dk.add_(summed(of_key, key.shape[2]))


def _launch_totals(totals: Tensor, sums: Tensor, gate: Tensor, ratio: int, pieces: int, sizes: int, step: int) -> None:
    rows, batch, heads, dim = gate.shape
    enqueue(
        totals_kernel,
        (batch * heads * cdiv(dim, channels_of(dim)), pieces, sizes),
        [totals, sums],
        (strides(totals), strides(sums), heads, ratio, rows, step),
        {"K": dim, "CHANNELS": channels_of(dim), "ROWS": blocks_of("decay", dim, 4).rows},
        num_warps=1,
    )
