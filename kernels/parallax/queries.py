"""Backward by tiles of queries, which sums dq and dr, and writes what tiles of keys need of a query. Formulas: `backward`."""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_lighthouse.kernels.parallax.tiles import first_seen, keys_of, loaded, put, seen, source, tile


@triton.jit
def _queries_over_keys(
    state,
    q,
    r,
    g,
    above,
    lse,
    of_covariance,
    of_value,
    k_rows,
    v_rows,
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
    BULK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq / scale and -dr over the keys begin..end - 1 too."""
    dq, dr = state
    for i_first in range(begin, end, BLOCK_N):
        v = loaded(v_rows, stride_v, i_first, keys, BULK, D, BLOCK_D, BLOCK_N)
        past = tl.dot(g, tl.trans(v), input_precision="ieee") - of_value[:, None]
        k = loaded(k_rows, stride_k, i_first, keys, BULK, D, BLOCK_D, BLOCK_N)
        weights = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE - lse[:, None])
        if MASKED:
            i_n = i_first + tl.arange(0, BLOCK_N)
            weights = tl.where(seen(i_m[:, None], i_n[None, :], low[:, None], keys, CAUSAL), weights, 0.0)
        past *= weights
        below = above[:, None] - tl.dot(r, tl.trans(k), input_precision="ieee")
        of_logits = weights * of_covariance[:, None] + below * past
        dq = tl.dot(of_logits.to(k.dtype), k, dq, input_precision="ieee")
        dr = tl.dot(past.to(k.dtype), k, dr, input_precision="ieee")
    return dq, dr


@triton.jit(repr=lambda _: "parallax_queries_backward", do_not_specialize=["rows", "keys"])
def queries_kernel(
    p_q,
    p_r,
    p_k,
    p_v,
    p_grad,
    p_value,
    p_output,
    p_mean,
    p_lse,
    p_dq,
    p_dr,
    p_terms,
    p_starts,
    strides_q,
    strides_r,
    strides_k,
    strides_v,
    strides_grad,
    strides_value,
    strides_output,
    strides_mean,
    strides_lse,
    strides_dq,
    strides_dr,
    rows,
    keys,
    H,
    R,
    stride_terms,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    CAUSAL: tl.constexpr,
    BULK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program b * H + h of each tile of queries, as forward. Writes terms of a whole tile: rows past the end weigh nothing."""
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
    output = tile(p_output + i_b * strides_output[1] + i_h * strides_output[2], strides_output[0], i_m, rows, D, BLOCK_D)
    of_value = tl.sum(g.to(tl.float32) * value.to(tl.float32), 1)
    of_covariance = of_value - tl.sum(g.to(tl.float32) * output.to(tl.float32), 1)
    p_mean += i_b * strides_mean[1] + i_h * strides_mean[2] + i_m64 * strides_mean[0]
    p_lse += i_b * strides_lse[0] + i_h * strides_lse[1] + i_m64 * strides_lse[2]
    mean = tl.load(p_mean, mask=m_row, other=0.0)
    lse = tl.load(p_lse, mask=m_row, other=1e30) * 1.4426950408889634
    above, scale = mean + 1, SCALE * 0.6931471805599453
    p_terms += i_head * 4 * stride_terms + i_m
    tl.store(p_terms, lse)
    tl.store(p_terms + stride_terms, above)
    tl.store(p_terms + 2 * stride_terms, of_value)
    tl.store(p_terms + 3 * stride_terms, of_covariance * scale)

    s_k, s_v = strides_k[0], strides_v[0]
    k_rows = source(p_k + i_b * strides_k[1] + i_g * strides_k[2], s_k, keys, BULK, D, BLOCK_D, BLOCK_N)
    v_rows = source(p_v + i_b * strides_v[1] + i_g * strides_v[2], s_v, keys, BULK, D, BLOCK_D, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    state = (acc, acc)
    i_last = tl.minimum(i_first + BLOCK_M, rows) - 1
    low = first_seen(p_starts, tl.minimum(i_m, rows - 1), WINDOW, DOCUMENTS)
    low_first, low_last = (first_seen(p_starts, i_first, WINDOW, DOCUMENTS), first_seen(p_starts, i_last, WINDOW, DOCUMENTS))
    begin, whole, masked, end = keys_of(i_first, low_first, low_last, keys, BLOCK_M, BLOCK_N, CAUSAL)
    if WINDOW or DOCUMENTS:
        state = _queries_over_keys(
            state, q, r, g, above, lse, of_covariance, of_value, k_rows, v_rows, s_k, s_v, i_m, low, begin, whole, keys,
            SCALE, CAUSAL, True, BULK, D, BLOCK_D, BLOCK_N,
        )  # fmt: skip
    state = _queries_over_keys(
        state, q, r, g, above, lse, of_covariance, of_value, k_rows, v_rows, s_k, s_v, i_m, low, whole, masked, keys,
        SCALE, CAUSAL, False, BULK, D, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    dq, dr = _queries_over_keys(
        state, q, r, g, above, lse, of_covariance, of_value, k_rows, v_rows, s_k, s_v, i_m, low, masked, end, keys,
        SCALE, CAUSAL, True, BULK, D, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    put(p_dq + i_b * strides_dq[1] + i_h * strides_dq[2], strides_dq[0], i_m, rows, dq * scale, D, BLOCK_D)
    put(p_dr + i_b * strides_dr[1] + i_h * strides_dr[2], strides_dr[0], i_m, rows, -dr, D, BLOCK_D)
