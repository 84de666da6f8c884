"""Backward by tiles of queries over earlier tiles of keys: completes dq, and the queries' side of dP. See `near`."""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_lighthouse.kernels.parallax.tiles import put, tile
from megatron_lighthouse.kernels.wall.tiles import from_first, gates, parts, scalars, scalars_after


@triton.jit(repr=lambda _: "wall_queries_backward", do_not_specialize=["rows"])
def queries_kernel(
    p_v,
    p_gate,
    p_scalar,
    p_near,
    p_far,
    p_totals,
    p_grad,
    p_lse,
    p_delta,
    p_sum_dq,
    p_dq,
    p_sums,
    p_scalar_sums,
    p_first,
    strides_v,
    strides_gate,
    strides_scalar,
    strides_near,
    strides_far,
    strides_totals,
    strides_grad,
    strides_lse,
    strides_delta,
    strides_sum_dq,
    strides_dq,
    strides_sums,
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
    """Program b * H + h of each tile, as forward. Adds to what `near` left in the fp32 sums."""
    scale: tl.constexpr = SCALE * 0.6931471805599453
    tiles = (rows + ROWS - 1) // ROWS
    heads = tl.num_programs(0) // tiles
    i_tile, i_head = tl.program_id(0) // heads, (tl.program_id(0) % heads).to(tl.int64)
    i_b, i_h = i_head // H, i_head % H
    i, i_k = tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    i_m = i_tile * ROWS + i
    m_row, i_m64 = i_m < rows, i_m.to(tl.int64)
    q = tile(p_near + i_b * strides_near[1] + i_h * strides_near[2], strides_near[0], i_m, rows, K, BLOCK_K)
    grad = tile(p_grad + i_b * strides_grad[1] + i_h * strides_grad[2], strides_grad[0], i_m, rows, V, BLOCK_V)
    p_lse += i_b * strides_lse[0] + i_h * strides_lse[1] + i_m64 * strides_lse[2]
    p_delta += i_b * strides_delta[0] + i_h * strides_delta[1] + i_m64 * strides_delta[2]
    lse, delta = tl.load(p_lse, mask=m_row, other=0.0) * 1.4426950408889634, tl.load(p_delta, mask=m_row, other=0.0)
    first = tl.load(p_first + i_m, mask=m_row, other=0)
    p_far += i_b * strides_far[1] + i_h * strides_far[2]
    p_v += i_b * strides_v[1] + i_h // R * strides_v[2]
    p_totals += (i_tile - 1).to(tl.int64) * strides_totals[0] + i_b * strides_totals[1] + i_h * strides_totals[2]
    if SCALAR:
        p_scalar += i_b * strides_scalar[1] + i_h * strides_scalar[2]
        scalar_before, scalar_between = tl.cumsum(scalars(p_scalar, strides_scalar[0], i_m, rows), 0), 0.0
        scalar_sums = tl.zeros([ROWS], tl.float32)

    dq, sums = tl.zeros([ROWS, BLOCK_K], tl.float32), tl.zeros([ROWS, BLOCK_K], tl.float32)
    exponent = tl.zeros([BLOCK_K], tl.float32)
    for back in range(1, i_tile - tl.load(p_first + i_tile * ROWS) // ROWS + 1):
        i_far = i_tile - back
        i_n = i_far * ROWS + i
        decay = tl.exp(exponent)[None, :]
        q_far, k = (q * decay).to(q.dtype), tile(p_far, strides_far[0], i_n, rows, K, BLOCK_K)
        logits = tl.dot(q_far, tl.trans(k), input_precision="ieee") * SCALE
        if SCALAR:
            scalar_after = scalars_after(p_scalar, strides_scalar[0], i_n, rows, ROWS)
            logits += (scalar_before[:, None] + scalar_after[None, :] + scalar_between) * 1.4426950408889634
            scalar_between += tl.sum(scalars(p_scalar, strides_scalar[0], i_n, rows), 0)
        weights = tl.where(i_n[None, :] >= first[:, None], tl.exp2(logits - lse[:, None]), 0.0)
        v = tile(p_v, strides_v[0], i_n, rows, V, BLOCK_V)
        change = weights * (tl.dot(grad, tl.trans(v), input_precision="ieee") - delta[:, None])
        if SCALAR:
            scalar_sums += tl.sum(change, 1)
        of_q = tl.dot(change.to(q.dtype), k, input_precision="ieee")
        dq += decay * of_q
        sums += q_far.to(tl.float32) * of_q
        exponent += tl.load(p_totals + i_k, mask=i_k < K, other=0.0)
        p_totals -= strides_totals[0]

    p_gate += i_b * strides_gate[1] + i_h * strides_gate[2]
    g = gates(p_gate, strides_gate[0], i_m, rows, K, BLOCK_K)
    before = from_first(parts(g, p_near.dtype.element_ty), POWER, ROWS)
    p_sum_dq += i_b * strides_sum_dq[1] + i_h * strides_sum_dq[2]
    p_sums += i_b * strides_sums[1] + i_h * strides_sums[2]
    dq = dq * scale * tl.exp(before) + tile(p_sum_dq, strides_sum_dq[0], i_m, rows, K, BLOCK_K)
    put(p_dq + i_b * strides_dq[1] + i_h * strides_dq[2], strides_dq[0], i_m, rows, dq, K, BLOCK_K)
    put(p_sums, strides_sums[0], i_m, rows, tile(p_sums, strides_sums[0], i_m, rows, K, BLOCK_K) + sums * scale, K, BLOCK_K)
    if SCALAR:
        p_scalar_sums += i_b * strides_scalar_sums[0] + i_h * strides_scalar_sums[1] + i_m64 * strides_scalar_sums[2]
        tl.store(p_scalar_sums, tl.load(p_scalar_sums, mask=m_row, other=0.0) + scalar_sums, mask=m_row)
