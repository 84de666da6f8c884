"""Backward by tiles of keys over later tiles of queries: completes dk, dv and dP. See `near`."""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_lighthouse.kernels.parallax.tiles import put, tile
from megatron_lighthouse.kernels.wall.tiles import gates, parts, scalars, scalars_after, to_last


@triton.jit(repr=lambda _: "wall_keys_backward", do_not_specialize=["rows"])
def keys_kernel(
    p_v,
    p_gate,
    p_scalar,
    p_near,
    p_far,
    p_totals,
    p_grad,
    p_lse,
    p_delta,
    p_sum_dk,
    p_sum_dv,
    p_dk,
    p_dv,
    p_sums,
    p_scalar_sums,
    p_first,
    p_ends,
    strides_v,
    strides_gate,
    strides_scalar,
    strides_near,
    strides_far,
    strides_totals,
    strides_grad,
    strides_lse,
    strides_delta,
    strides_sum_dk,
    strides_sum_dv,
    strides_dk,
    strides_dv,
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
    """Program b * G + g of each tile.

    p_sum_dk and p_sum_dv: of each query head. p_ends: of each tile, how many rows there are up to the last that sees its keys.
    """
    scale: tl.constexpr = SCALE * 0.6931471805599453
    tiles = (rows + ROWS - 1) // ROWS
    groups = tl.num_programs(0) // tiles
    i_tile = tl.program_id(0) // groups
    i_b, i_g = (tl.program_id(0) % groups // (H // R)).to(tl.int64), (tl.program_id(0) % groups % (H // R)).to(tl.int64)
    i, i_k = tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    i_n = i_tile * ROWS + i
    n_row, i_n64 = i_n < rows, i_n.to(tl.int64)
    v = tile(p_v + i_b * strides_v[1] + i_g * strides_v[2], strides_v[0], i_n, rows, V, BLOCK_V)
    dk, dv = tl.zeros([ROWS, BLOCK_K], tl.float32), tl.zeros([ROWS, BLOCK_V], tl.float32)
    end = tl.load(p_ends + i_tile)
    for i_of_group in range(R):
        i_h = i_g * R + i_of_group
        k = tile(p_far + i_b * strides_far[1] + i_h * strides_far[2], strides_far[0], i_n, rows, K, BLOCK_K)
        p_near_h = p_near + i_b * strides_near[1] + i_h * strides_near[2]
        p_grad_h = p_grad + i_b * strides_grad[1] + i_h * strides_grad[2]
        p_lse_h = p_lse + i_b * strides_lse[0] + i_h * strides_lse[1]
        p_delta_h = p_delta + i_b * strides_delta[0] + i_h * strides_delta[1]
        p_totals_h = (
            p_totals + (i_tile + 1).to(tl.int64) * strides_totals[0] + i_b * strides_totals[1] + i_h * strides_totals[2]
        )
        if SCALAR:
            p_scalar_h = p_scalar + i_b * strides_scalar[1] + i_h * strides_scalar[2]
            scalar_after, scalar_between = scalars_after(p_scalar_h, strides_scalar[0], i_n, rows, ROWS), 0.0
            scalar_sums = tl.zeros([ROWS], tl.float32)
        of_k = tl.zeros([ROWS, BLOCK_K], tl.float32)
        exponent = tl.zeros([BLOCK_K], tl.float32)
        for i_near in range(i_tile + 1, (end - 1) // ROWS + 1):
            i_m = i_near * ROWS + i
            m_row, i_m64 = i_m < rows, i_m.to(tl.int64)
            q = tile(p_near_h, strides_near[0], i_m, rows, K, BLOCK_K)
            q_far = (q * tl.exp(exponent)[None, :]).to(q.dtype)
            logits = tl.dot(q_far, tl.trans(k), input_precision="ieee") * SCALE
            if SCALAR:
                scalar = scalars(p_scalar_h, strides_scalar[0], i_m, rows)
                logits += (tl.cumsum(scalar, 0)[:, None] + scalar_after[None, :] + scalar_between) * 1.4426950408889634
                scalar_between += tl.sum(scalar, 0)
            lse = tl.load(p_lse_h + i_m64 * strides_lse[2], mask=m_row, other=0.0) * 1.4426950408889634
            first = tl.load(p_first + i_m, mask=m_row, other=rows)
            weights = tl.where(i_n[None, :] >= first[:, None], tl.exp2(logits - lse[:, None]), 0.0)
            grad = tile(p_grad_h, strides_grad[0], i_m, rows, V, BLOCK_V)
            dv = tl.dot(tl.trans(weights.to(grad.dtype)), grad, dv, input_precision="ieee")
            delta = tl.load(p_delta_h + i_m64 * strides_delta[2], mask=m_row, other=0.0)
            change = weights * (tl.dot(grad, tl.trans(v), input_precision="ieee") - delta[:, None])
            if SCALAR:
                scalar_sums += tl.sum(change, 0)
            of_k = tl.dot(tl.trans(change.to(q.dtype)), q_far, of_k, input_precision="ieee")
            exponent += tl.load(p_totals_h + i_k, mask=i_k < K, other=0.0)
            p_totals_h += strides_totals[0]
        of_k *= scale
        p_sum_dv_h = p_sum_dv + i_b * strides_sum_dv[1] + i_h * strides_sum_dv[2]
        dv += tile(p_sum_dv_h, strides_sum_dv[0], i_n, rows, V, BLOCK_V)
        if i_of_group == R - 1:  # what is done is written before the next is read, for which there is no room
            put(p_dv + i_b * strides_dv[1] + i_g * strides_dv[2], strides_dv[0], i_n, rows, dv, V, BLOCK_V)
        p_sums_h = p_sums + i_b * strides_sums[1] + i_h * strides_sums[2]
        sums = tile(p_sums_h, strides_sums[0], i_n, rows, K, BLOCK_K) - of_k * k.to(tl.float32)
        put(p_sums_h, strides_sums[0], i_n, rows, sums, K, BLOCK_K)
        if SCALAR:
            p_scalar_sums_h = p_scalar_sums + i_b * strides_scalar_sums[0] + i_h * strides_scalar_sums[1]
            p_scalar_sums_h += i_n64 * strides_scalar_sums[2]
            tl.store(p_scalar_sums_h, tl.load(p_scalar_sums_h, mask=n_row, other=0.0) - scalar_sums, mask=n_row)
        p_gate_h = p_gate + i_b * strides_gate[1] + i_h * strides_gate[2]
        g = parts(gates(p_gate_h, strides_gate[0], i_n, rows, K, BLOCK_K), p_near.dtype.element_ty)
        p_sum_dk_h = p_sum_dk + i_b * strides_sum_dk[1] + i_h * strides_sum_dk[2]
        dk += of_k * tl.exp(to_last(g, POWER, ROWS)) + tile(p_sum_dk_h, strides_sum_dk[0], i_n, rows, K, BLOCK_K)
    put(p_dk + i_b * strides_dk[1] + i_g * strides_dk[2], strides_dk[0], i_n, rows, dk, K, BLOCK_K)
