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

from megatron_lighthouse.kernels.launch import last_contiguous
from megatron_lighthouse.kernels.wall.decays import place
from megatron_lighthouse.kernels.wall.halving import (
    decays_of,
    factor_of,
    factors_by,
    halves_of,
    launch,
    ratios_of,
    read,
    write,
)
from megatron_lighthouse.kernels.wall.halving_sums import sizes_of, sums_beside
from megatron_lighthouse.wall.decay import summed


@triton.jit(repr=lambda _: "wall_halves_backward", do_not_specialize=["rows", "step"])
def backward_kernel(
    p_q,
    p_k,
    p_gate,
    p_factors,
    p_of_near,
    p_of_far,
    p_dq,
    p_dk,
    p_dg,
    p_totals,
    strides_q,
    strides_k,
    strides_gate,
    strides_factors,
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
    SIZES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Likewise: adds to the gradients, of keys for each head of the gates, and of gates what the tile's own rows give."""
    i_tile, i_b, i_h, i_m, end = place(rows, step, H, ROWS)
    tiles = (step + ROWS - 1) // ROWS
    all_tiles = (rows + step - 1) // step * tiles
    i_k, m_row = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS), i_m < end
    later, meets, begins = halves_of(i_tile // tiles, rows, step, SIZES)
    p_factors += i_b * strides_factors[1] + i_h * strides_factors[2]
    p_totals += i_b * strides_totals[1] + i_k
    p_of_far += i_b * strides_of_far[1] + i_h * strides_of_far[2]
    p_gate += i_b * strides_gate[1] + i_h * strides_gate[2]
    p_dk += i_b * strides_dk[1] + i_h * strides_dk[2]
    p_dg += i_b * strides_dg[1] + i_h * strides_dg[2]
    k = read(p_k + i_b * strides_k[1] + i_h // S * strides_k[2], strides_k[0], i_m, m_row, i_k, K)
    dk = read(p_dk, strides_dk[0], i_m, m_row, i_k, K)
    of_gate = read(p_dg, strides_dg[0], i_m, m_row, i_k, K)
    zero = tl.zeros([ROWS, CHANNELS], tl.float32)
    of_k, products, after = zero, zero, zero
    for i in range(R):
        i_q = i_h * R + i
        p_of_q = p_of_near + i_b * strides_of_near[1] + i_q * strides_of_near[2]
        p_dq_q = p_dq + i_b * strides_dq[1] + i_q * strides_dq[2]
        q = read(p_q + i_b * strides_q[1] + i_q * strides_q[2], strides_q[0], i_m, m_row, i_k, K)
        grads = ()
        for l in tl.static_range(SIZES):
            p_of = tl.where(later[l], p_of_q, p_of_far)
            stride = tl.where(later[l], strides_of_near[0], strides_of_far[0])
            grads += (read(p_of, stride, begins[l] + i_m, m_row & meets[l] & (later[l] | (i == 0)), i_k, K),)
        dq = read(p_dq_q, strides_dq[0], i_m, m_row, i_k, K)
        before, after = decays_of(p_gate, strides_gate[0], i_m, end, i_k, K)
        of_q = zero
        for l in tl.static_range(SIZES):
            if meets[l]:
                grad = grads[l].to(tl.float32) * factor_of(p_factors, strides_factors[0], l * all_tiles + i_tile, i_k, K)
                p_total = p_totals + (l * all_tiles + i_tile).to(tl.int64) * strides_totals[0] + i_q * strides_totals[2]
                if later[l]:
                    of_q += grad
                    grad = q * before * grad
                else:
                    of_k += grad
                    grad = k * after * grad
                tl.store(p_total, tl.sum(grad, 0), mask=i_k < K)
        products += q * before * of_q
        write(p_dq_q, strides_dq[0], i_m, m_row, dq + of_q * before, i_k, K)
    write(p_dk, strides_dk[0], i_m, m_row, dk + of_k * after, i_k, K)
    of_gate += tl.cumsum(products, 0, reverse=True)
    products = k * after * of_k
    of_gate += tl.cumsum(products, 0) - products  # within a tile, in fp32
    write(p_dg, strides_dg[0], i_m, m_row, of_gate, i_k, K)


@triton.jit(repr=lambda _: "wall_halves_gates", do_not_specialize=["rows", "step"])
def gates_kernel(
    p_sums,
    p_dg,
    strides_sums,
    strides_dg,
    H,
    rows,
    step,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIZES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Adds what other tiles give to the gates' gradients. Programs as of `halves_kernel`."""
    i_tile, i_b, i_h, i_m, end = place(rows, step, H, ROWS)
    tiles, i_k = (rows + step - 1) // step * ((step + ROWS - 1) // ROWS), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    p_sums += i_b * strides_sums[1] + i_h * strides_sums[2] + i_k
    p_dg += i_b * strides_dg[1] + i_h * strides_dg[2]
    total = read(p_dg, strides_dg[0], i_m, i_m < end, i_k, K)
    for l in tl.static_range(SIZES):
        p_sum = p_sums + (l * tiles + i_tile).to(tl.int64) * strides_sums[0]
        total += tl.load(p_sum, mask=i_k < K, other=0.0)[None, :]
    write(p_dg, strides_dg[0], i_m, i_m < end, total, i_k, K)


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
    SIZES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Adds to the values' gradients those of the earlier halves. Likewise, of a value's head."""
    i_tile, i_b, i_h, i_m, end = place(rows, step, H, ROWS)
    i_piece, i_k, m_row = i_tile // ((step + ROWS - 1) // ROWS), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS), i_m < end
    p_of += i_b * strides_of[1] + i_h * strides_of[2]
    p_dv += i_b * strides_dv[1] + i_h * strides_dv[2]
    later, meets, begins = halves_of(i_piece, rows, step, SIZES)
    total = read(p_dv, strides_dv[0], i_m, m_row, i_k, K).to(tl.float32)
    grads = ()
    for l in tl.static_range(SIZES):
        grads += (read(p_of, strides_of[0], begins[l] + i_m, m_row & meets[l] & ~later[l], i_k, K),)
    for l in tl.static_range(SIZES):
        total += grads[l].to(tl.float32)
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
    tiles = tile_sums.shape[0] * tile_sums.shape[1]
    totals = torch.empty(sizes_of(len(gate), step) * tiles, *query.shape[1:], dtype=torch.float32, device=query.device)
    given, ratios = [*map(last_contiguous, (query, key, gate)), factors_by(tile_sums, gate, step)], ratios_of(query, key, gate)
    launch(backward_kernel, [*given, of_near, of_far, dq, of_key, dg, totals], gate, ratios, step)
    launch(gates_kernel, [sums_beside(totals, gate, ratios[0], step), dg], gate, (), step)
    launch(values_kernel, [of_value, dv], dv, (), step)
    if shared:
        dk.add_(summed(of_key, key.shape[2]))
