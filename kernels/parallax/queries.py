"""Backward by tiles of queries, which sums dq and dr, and writes dO·o and dO·v̄ for the tiles of keys. Formulas: `backward`."""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_lighthouse.kernels.parallax.tiles import first_seen, keys_of, put, seen, tile


@triton.jit
def _queries_over_keys(
    state,
    q,
    r,
    g,
    mean,
    lse,
    of_output,
    of_value,
    p_k,
    p_v,
    stride_k,
    stride_v,
    i_m,
    low,
    begin,
    end,
    keys,
    SCALE: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq / scale and dr over the keys begin..end - 1 too."""
    dq, dr = state
    for i_first in range(begin, end, BLOCK_N):
        i_n = i_first + tl.arange(0, BLOCK_N)
        k = tile(p_k, stride_k, i_n, keys, D, BLOCK_D)
        weights = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE - lse[:, None])
        if MASKED:
            weights = tl.where(seen(i_m[:, None], i_n[None, :], low[:, None], keys, CAUSAL), weights, 0.0)
        below = mean[:, None] - tl.dot(r, tl.trans(k), input_precision="ieee")
        v = tile(p_v, stride_v, i_n, keys, D, BLOCK_D)
        along = tl.dot(g, tl.trans(v), input_precision="ieee")
        past = along - of_value[:, None]
        of_logits = weights * (along - of_output[:, None] + below * past)
        dq = tl.dot(of_logits.to(k.dtype), k, dq, input_precision="ieee")
        dr = tl.dot((weights * past).to(k.dtype), k, dr, input_precision="ieee")
    return dq, dr


@triton.jit(repr=lambda _: "parallax_queries_backward", do_not_specialize=["rows", "keys"])
def queries_kernel(
    p_q,
    p_r,
    p_k,
    p_v,
    p_grad,
    p_value,
    p_covariance,
    p_mean,
    p_lse,
    p_dq,
    p_dr,
    p_of_output,
    p_of_value,
    p_starts,
    strides_q,
    strides_r,
    strides_k,
    strides_v,
    strides_grad,
    strides_value,
    strides_covariance,
    strides_mean,
    strides_lse,
    strides_dq,
    strides_dr,
    rows,
    keys,
    H,
    R,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program b * H + h of each tile of queries, as forward. Writes t and b too, [B, H, n] each."""
    tiles = (rows + BLOCK_M - 1) // BLOCK_M
    heads = tl.num_programs(0) // tiles
    i_first, i_head = (tiles - 1 - tl.program_id(0) // heads) * BLOCK_M, (tl.program_id(0) % heads).to(tl.int64)
    i_b, i_h = i_head // H, i_head % H
    i_g = i_h // R
    i_m = i_first + tl.arange(0, BLOCK_M)
    m_row, i_m64 = i_m < rows, i_m.to(tl.int64)
    q = tile(p_q + i_b * strides_q[1] + i_h * strides_q[2], strides_q[0], i_m, rows, D, BLOCK_D)
    r = tile(p_r + i_b * strides_r[1] + i_h * strides_r[2], strides_r[0], i_m, rows, D, BLOCK_D)
    g = tile(p_grad + i_b * strides_grad[1] + i_h * strides_grad[2], strides_grad[0], i_m, rows, D, BLOCK_D)
    value = tile(p_value + i_b * strides_value[1] + i_h * strides_value[2], strides_value[0], i_m, rows, D, BLOCK_D)
    p_covariance += i_b * strides_covariance[1] + i_h * strides_covariance[2]
    covariance = tile(p_covariance, strides_covariance[0], i_m, rows, D, BLOCK_D)
    of_value = tl.sum(g.to(tl.float32) * value.to(tl.float32), 1)
    of_output = of_value - tl.sum(g.to(tl.float32) * covariance.to(tl.float32), 1)
    tl.store(p_of_value + i_head * rows + i_m64, of_value, mask=m_row)
    tl.store(p_of_output + i_head * rows + i_m64, of_output, mask=m_row)
    p_mean += i_b * strides_mean[1] + i_h * strides_mean[2] + i_m64 * strides_mean[0]
    p_lse += i_b * strides_lse[0] + i_h * strides_lse[1] + i_m64 * strides_lse[2]
    mean = tl.load(p_mean, mask=m_row, other=0.0)
    lse = tl.load(p_lse, mask=m_row, other=0.0) * 1.4426950408889634

    p_k += i_b * strides_k[1] + i_g * strides_k[2]
    p_v += i_b * strides_v[1] + i_g * strides_v[2]
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    state = (acc, acc)
    s_k, s_v = strides_k[0], strides_v[0]
    i_last = tl.minimum(i_first + BLOCK_M, rows) - 1
    low = first_seen(p_starts, tl.minimum(i_m, rows - 1), WINDOW, DOCUMENTS)
    low_first, low_last = (first_seen(p_starts, i_first, WINDOW, DOCUMENTS), first_seen(p_starts, i_last, WINDOW, DOCUMENTS))
    begin, whole, masked, end = keys_of(i_first, low_first, low_last, keys, BLOCK_M, BLOCK_N, CAUSAL)
    if WINDOW or DOCUMENTS:
        state = _queries_over_keys(
            state, q, r, g, mean, lse, of_output, of_value, p_k, p_v, s_k, s_v, i_m, low, begin, whole, keys,
            SCALE, CAUSAL, True, D, BLOCK_D, BLOCK_N,
        )  # fmt: skip
    state = _queries_over_keys(
        state, q, r, g, mean, lse, of_output, of_value, p_k, p_v, s_k, s_v, i_m, low, whole, masked, keys,
        SCALE, CAUSAL, False, D, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    dq, dr = _queries_over_keys(
        state, q, r, g, mean, lse, of_output, of_value, p_k, p_v, s_k, s_v, i_m, low, masked, end, keys,
        SCALE, CAUSAL, True, D, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    scale: tl.constexpr = SCALE * 0.6931471805599453
    put(p_dq + i_b * strides_dq[1] + i_h * strides_dq[2], strides_dq[0], i_m, rows, dq * scale, D, BLOCK_D)
    put(p_dr + i_b * strides_dr[1] + i_h * strides_dr[2], strides_dr[0], i_m, rows, -dr, D, BLOCK_D)
