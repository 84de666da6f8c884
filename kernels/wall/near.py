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
    channels,
    gates_of,
    held,
    near_logits,
    put_channels,
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
    POWER: tl.constexpr,
):
    """Program b * H + h of each tile."""
    precision: tl.constexpr = "ieee" if WIDE else "tf32x3"
    scale: tl.constexpr = SCALE * 0.6931471805599453
    CHANNELS: tl.constexpr = BLOCK_K if BLOCK_K < 32 else 32
    heads = tl.num_programs(0) // ((rows + ROWS - 1) // ROWS)
    i_head = (tl.program_id(0) % heads).to(tl.int64)
    i_b, i_h = i_head // H, i_head % H
    i_g = i_h // R
    i = tl.arange(0, ROWS)
    i_m = tl.program_id(0) // heads * ROWS + i
    m_row, i_m64 = i_m < rows, i_m.to(tl.int64)
    first = tl.load(p_first + i_m, mask=m_row, other=0)
    visible = (i[:, None] >= i[None, :]) & (i_m[None, :] >= first[:, None])
    p_q += i_b * strides_q[1] + i_h * strides_q[2]
    p_k += i_b * strides_k[1] + i_g * strides_k[2]
    p_gate += i_b * strides_gate[1] + i_h * strides_gate[2]
    p_dq += i_b * strides_dq[1] + i_h * strides_dq[2]
    p_dk += i_b * strides_dk[1] + i_h * strides_dk[2]
    p_sums += i_b * strides_sums[1] + i_h * strides_sums[2]
    grad = tile(p_grad + i_b * strides_grad[1] + i_h * strides_grad[2], strides_grad[0], i_m, rows, V, BLOCK_V)
    out = tile(p_out + i_b * strides_out[1] + i_h * strides_out[2], strides_out[0], i_m, rows, V, BLOCK_V)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    p_lse += i_b * strides_lse[0] + i_h * strides_lse[1]
    lse = tl.load(p_lse + i_m64 * strides_lse[2], mask=m_row, other=0.0)
    logits = near_logits(
        p_q, p_k, p_gate, strides_q[0], strides_k[0], strides_gate[0],
        i_m, rows, WIDE, K, BLOCK_K, POWER, ROWS,
    ) * SCALE  # fmt: skip
    if SCALAR:
        p_scalar += i_b * strides_scalar[1] + i_h * strides_scalar[2]
        logits += between(scalars(p_scalar, strides_scalar[0], i_m, rows), ROWS) * 1.4426950408889634
    weights = tl.where(visible, tl.exp2(logits - (lse * 1.4426950408889634)[:, None]), 0.0)
    dv = tl.dot(tl.trans(weights.to(grad.dtype)), grad, input_precision="ieee")
    put(p_dv + i_b * strides_dv[1] + i_h * strides_dv[2], strides_dv[0], i_m, rows, dv, V, BLOCK_V)
    v = tile(p_v + i_b * strides_v[1] + i_g * strides_v[2], strides_v[0], i_m, rows, V, BLOCK_V)
    change = weights * (tl.dot(grad, tl.trans(v), input_precision="ieee") - delta[:, None])
    tl.store(p_delta + i_b * strides_delta[0] + i_h * strides_delta[1] + i_m64 * strides_delta[2], delta, mask=m_row)
    own = tl.sum(tl.where(i[:, None] == i[None, :], change, 0.0), 1)[:, None]
    change = tl.where(i[:, None] == i[None, :], 0.0, change)
    if SCALAR:
        p_scalar_sums += i_b * strides_scalar_sums[0] + i_h * strides_scalar_sums[1]
        tl.store(p_scalar_sums + i_m64 * strides_scalar_sums[2], tl.sum(change, 1) - tl.sum(change, 0), mask=m_row)

    for i_first in range(0, BLOCK_K, CHANNELS):
        i_k = i_first + tl.arange(0, CHANNELS)
        q, k = channels(p_q, strides_q[0], i_m, rows, i_k, K), channels(p_k, strides_k[0], i_m, rows, i_k, K)
        g = gates_of(p_gate, strides_gate[0], i_m, rows, i_k, K, q.dtype)
        w_q, w_k = anchored_corner(g, ROWS)
        q_level, k_level = held(q * w_q, q.dtype), held(k * w_k, q.dtype)
        part = held(tl.where(together(3, ROWS), change, 0.0), q.dtype)
        of_q = tl.dot(part, k_level, input_precision=precision)
        of_k = tl.dot(tl.trans(part), q_level, input_precision=precision)
        dq, dk = own * k.to(tl.float32) + w_q * of_q, own * q.to(tl.float32) + w_k * of_k
        sums = q_level.to(tl.float32) * of_q - k_level.to(tl.float32) * of_k
        for power in range(4, POWER + 1):
            w_q, w_k = anchored(g, power, ROWS)
            q_half, k_half = (q * w_q).to(q.dtype), (k * w_k).to(k.dtype)  # other names: `held` may be of another dtype
            half = tl.where(together(power, ROWS), change, 0.0).to(q.dtype)
            of_q = tl.dot(half, k_half, input_precision="ieee")
            of_k = tl.dot(tl.trans(half), q_half, input_precision="ieee")
            dq += w_q * of_q
            dk += w_k * of_k
            sums += q_half.to(tl.float32) * of_q - k_half.to(tl.float32) * of_k
        put_channels(p_dq, strides_dq[0], i_m, rows, dq * scale, i_k, K)
        put_channels(p_sums, strides_sums[0], i_m, rows, sums * scale, i_k, K)
        put_channels(p_dk, strides_dk[0], i_m, rows, dk * scale, i_k, K)
