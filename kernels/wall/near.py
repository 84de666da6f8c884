"""Backward of the pairs within a tile: their shares of all gradients at once, summed in fp32, and dO·out for the other kernels.

The gates' gradients are suffix sums of dP = q ⊙ dq - k ⊙ dk. A pair must add the same number to both sides, or what rounding
leaves of each row walks through all sums. So both sides are made of the rounded rows of which their products are made, here
and in the other kernels; and a query's own key, which adds the same to both, is left out. Ours.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_lighthouse.kernels.parallax.tiles import put, tile
from megatron_lighthouse.kernels.wall.tiles import (
    anchored,
    anchored_corner,
    between,
    gates,
    held,
    near_logits,
    scalars,
    together,
)


@triton.jit(repr=lambda _: "wall_near_backward", do_not_specialize=["rows"])
def near_kernel(
    p_q,
    p_k,
    p_v,
    p_gate,
    p_scalar,
    p_grad,
    p_out,
    p_lse,
    p_dq,
    p_dk,
    p_dv,
    p_sums,
    p_delta,
    p_scalar_sums,
    p_first,
    strides_q,
    strides_k,
    strides_v,
    strides_gate,
    strides_scalar,
    strides_grad,
    strides_out,
    strides_lse,
    strides_dq,
    strides_dk,
    strides_dv,
    strides_sums,
    strides_delta,
    strides_scalar_sums,
    rows,
    H,
    R,
    SCALE: tl.constexpr,
    SCALAR: tl.constexpr,
    WIDE: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Program b * G + g of each tile."""
    precision: tl.constexpr = "ieee" if WIDE else "tf32x3"
    scale: tl.constexpr = SCALE * 0.6931471805599453
    tiles = (rows + ROWS - 1) // ROWS
    groups = tl.num_programs(0) // tiles
    i_b, i_g = (tl.program_id(0) % groups // (H // R)).to(tl.int64), (tl.program_id(0) % groups % (H // R)).to(tl.int64)
    i = tl.arange(0, ROWS)
    i_m = tl.program_id(0) // groups * ROWS + i
    m_row, i_m64 = i_m < rows, i_m.to(tl.int64)
    k = tile(p_k + i_b * strides_k[1] + i_g * strides_k[2], strides_k[0], i_m, rows, K, BLOCK_K)
    v = tile(p_v + i_b * strides_v[1] + i_g * strides_v[2], strides_v[0], i_m, rows, V, BLOCK_V)
    first = tl.load(p_first + i_m, mask=m_row, other=0)
    visible = (i[:, None] >= i[None, :]) & (i_m[None, :] >= first[:, None])
    dk, dv = tl.zeros([ROWS, BLOCK_K], tl.float32), tl.zeros([ROWS, BLOCK_V], tl.float32)
    for i_of_group in range(R):
        i_h = i_g * R + i_of_group
        p_q_h = p_q + i_b * strides_q[1] + i_h * strides_q[2]
        q = tile(p_q_h, strides_q[0], i_m, rows, K, BLOCK_K)
        p_gate_h = p_gate + i_b * strides_gate[1] + i_h * strides_gate[2]
        g = gates(p_gate_h, strides_gate[0], i_m, rows, K, BLOCK_K)
        g_next = gates(p_gate_h, strides_gate[0], i_m + 1, rows, K, BLOCK_K)
        grad = tile(p_grad + i_b * strides_grad[1] + i_h * strides_grad[2], strides_grad[0], i_m, rows, V, BLOCK_V)
        out = tile(p_out + i_b * strides_out[1] + i_h * strides_out[2], strides_out[0], i_m, rows, V, BLOCK_V)
        delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
        p_lse_h = p_lse + i_b * strides_lse[0] + i_h * strides_lse[1]
        lse = tl.load(p_lse_h + i_m64 * strides_lse[2], mask=m_row, other=0.0)
        logits = near_logits(q, k, g, g_next, WIDE, ROWS, BLOCK_K) * SCALE
        if SCALAR:
            p_scalar_h = p_scalar + i_b * strides_scalar[1] + i_h * strides_scalar[2]
            logits += between(scalars(p_scalar_h, strides_scalar[0], i_m, rows), ROWS) * 1.4426950408889634
        weights = tl.where(visible, tl.exp2(logits - (lse * 1.4426950408889634)[:, None]), 0.0)
        dv = tl.dot(tl.trans(weights.to(grad.dtype)), grad, dv, input_precision="ieee")
        change = weights * (tl.dot(grad, tl.trans(v), input_precision="ieee") - delta[:, None])
        tl.store(p_delta + i_b * strides_delta[0] + i_h * strides_delta[1] + i_m64 * strides_delta[2], delta, mask=m_row)
        own = tl.sum(tl.where(i[:, None] == i[None, :], change, 0.0), 1)[:, None]
        change = tl.where(i[:, None] == i[None, :], 0.0, change)
        dq = own * k.to(tl.float32)
        dk += own * q.to(tl.float32)
        if SCALAR:
            p_scalar_sums_h = p_scalar_sums + i_b * strides_scalar_sums[0] + i_h * strides_scalar_sums[1]
            tl.store(p_scalar_sums_h + i_m64 * strides_scalar_sums[2], tl.sum(change, 1) - tl.sum(change, 0), mask=m_row)

        # read again: what the logits were made of would be kept in registers, a set of tiles for each level
        q = tile(p_q_h, strides_q[0], i_m, rows, K, BLOCK_K)
        g = gates(p_gate_h, strides_gate[0], i_m, rows, K, BLOCK_K)
        g_next = gates(p_gate_h, strides_gate[0], i_m + 1, rows, K, BLOCK_K)
        w_q, w_k = anchored_corner(g, g_next, ROWS, BLOCK_K)
        q_level, k_level = held(q * w_q, q.dtype), held(k * w_k, q.dtype)
        part = held(tl.where(together(8, ROWS), change, 0.0), q.dtype)
        of_q = tl.dot(part, k_level, input_precision=precision)
        dq += w_q * of_q
        sums = q_level.to(tl.float32) * of_q
        of_k = tl.dot(tl.trans(part), q_level, input_precision=precision)
        dk += w_k * of_k
        sums -= k_level.to(tl.float32) * of_k
        for level in tl.static_range(4):
            if ROWS >> (level + 1) >= 8:
                w_q, w_k = anchored(g, g_next, ROWS >> (level + 1), ROWS, BLOCK_K)
                q_level, k_level = (q * w_q).to(q.dtype), (k * w_k).to(k.dtype)
                part = tl.where(together(ROWS >> level, ROWS), change, 0.0).to(q.dtype)
                of_q = tl.dot(part, k_level, input_precision="ieee")
                dq += w_q * of_q
                sums += q_level.to(tl.float32) * of_q
                of_k = tl.dot(tl.trans(part), q_level, input_precision="ieee")
                dk += w_k * of_k
                sums -= k_level.to(tl.float32) * of_k
        put(p_dq + i_b * strides_dq[1] + i_h * strides_dq[2], strides_dq[0], i_m, rows, dq * scale, K, BLOCK_K)
        put(p_sums + i_b * strides_sums[1] + i_h * strides_sums[2], strides_sums[0], i_m, rows, sums * scale, K, BLOCK_K)
    put(p_dk + i_b * strides_dk[1] + i_g * strides_dk[2], strides_dk[0], i_m, rows, dk * scale, K, BLOCK_K)
    put(p_dv + i_b * strides_dv[1] + i_g * strides_dv[2], strides_dv[0], i_m, rows, dv, V, BLOCK_V)
