"""Backward by tiles of keys, which sums dk and dv over queries and the heads of a group, in fp32. Formulas: `backward`."""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_lighthouse.kernels.parallax.tiles import last_seeing, put, tile


@triton.jit
def _keys_over_queries(
    state,
    k,
    v,
    p_q,
    p_r,
    p_grad,
    p_terms,
    stride_q,
    stride_r,
    stride_grad,
    stride_terms,
    i_n,
    high,
    begin,
    end,
    rows,
    SCALE: tl.constexpr,
    CAUSAL: tl.constexpr,
    BOUNDED: tl.constexpr,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """dk and -dv over the queries begin..end - 1 of a head too. What is of pairs is [keys, queries] here.

    Products stand in the order in which the fewest of them are in registers at a time.
    """
    dk, dv = state
    scale: tl.constexpr = SCALE * 0.6931471805599453
    for i_first in range(begin, end, BLOCK_M):
        i_m = i_first + tl.arange(0, BLOCK_M)
        g = tile(p_grad, stride_grad, i_m, rows, D, BLOCK_D)
        past = tl.load(p_terms + 2 * stride_terms + i_m)[None, :] - tl.dot(v, tl.trans(g), input_precision="ieee")
        q = tile(p_q, stride_q, i_m, rows, D, BLOCK_D)
        weights = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * SCALE - tl.load(p_terms + i_m)[None, :])
        if MASKED:
            if CAUSAL:
                weights = tl.where(i_n[:, None] <= i_m[None, :], weights, 0.0)
            if BOUNDED:
                weights = tl.where(i_m[None, :] < high[:, None], weights, 0.0)
        past *= weights
        r = tile(p_r, stride_r, i_m, rows, D, BLOCK_D)
        dk = tl.dot(past.to(q.dtype), r, dk, input_precision="ieee")
        below = tl.dot(k, tl.trans(r), input_precision="ieee") - tl.load(p_terms + stride_terms + i_m)[None, :]
        of_logits = weights * tl.load(p_terms + 3 * stride_terms + i_m)[None, :] + below * (past * scale)
        dk = tl.dot(of_logits.to(q.dtype), q, dk, input_precision="ieee")
        dv = tl.dot((weights * below).to(g.dtype), g, dv, input_precision="ieee")
    return dk, dv


@triton.jit(repr=lambda _: "parallax_keys_backward", do_not_specialize=["rows", "keys"])
def keys_kernel(
    p_q,
    p_r,
    p_k,
    p_v,
    p_grad,
    p_dk,
    p_dv,
    p_terms,
    p_ends,
    strides_q,
    strides_r,
    strides_k,
    strides_v,
    strides_grad,
    strides_dk,
    strides_dv,
    rows,
    keys,
    H,
    R,
    stride_terms,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program b * G + g of each tile of keys, the first tiles first: most queries see them."""
    tiles = (keys + BLOCK_N - 1) // BLOCK_N
    groups = tl.num_programs(0) // tiles
    i_first = tl.program_id(0) // groups * BLOCK_N
    i_b, i_g = (tl.program_id(0) % groups // (H // R)).to(tl.int64), (tl.program_id(0) % groups % (H // R)).to(tl.int64)
    i_n = i_first + tl.arange(0, BLOCK_N)
    k = tile(p_k + i_b * strides_k[1] + i_g * strides_k[2], strides_k[0], i_n, keys, D, BLOCK_D)
    v = tile(p_v + i_b * strides_v[1] + i_g * strides_v[2], strides_v[0], i_n, keys, D, BLOCK_D)

    high = last_seeing(p_ends, tl.minimum(i_n, keys - 1), rows, WINDOW, DOCUMENTS)
    begin, whole, masked, end = 0, 0, rows, rows
    if CAUSAL:
        begin = i_first // BLOCK_M * BLOCK_M
        whole = tl.minimum((i_first + BLOCK_N - 1 + BLOCK_M - 1) // BLOCK_M * BLOCK_M, rows)
    if WINDOW or DOCUMENTS:
        i_last = tl.minimum(i_first + BLOCK_N, keys) - 1
        end = tl.minimum(last_seeing(p_ends, i_last, rows, WINDOW, DOCUMENTS), rows)
        whole = tl.minimum(whole, end)
        masked = tl.maximum(last_seeing(p_ends, i_first, rows, WINDOW, DOCUMENTS) // BLOCK_M * BLOCK_M, whole)
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    state = (acc, acc)
    s_q, s_r, s_g = strides_q[0], strides_r[0], strides_grad[0]
    for i_of_group in range(R):
        i_h = i_g * R + i_of_group
        p_q_h = p_q + i_b * strides_q[1] + i_h * strides_q[2]
        p_r_h = p_r + i_b * strides_r[1] + i_h * strides_r[2]
        p_grad_h = p_grad + i_b * strides_grad[1] + i_h * strides_grad[2]
        p_terms_h = p_terms + (i_b * H + i_h) * 4 * stride_terms
        if CAUSAL:
            state = _keys_over_queries(
                state, k, v, p_q_h, p_r_h, p_grad_h, p_terms_h, s_q, s_r, s_g, stride_terms,
                i_n, high, begin, whole, rows, SCALE, CAUSAL, WINDOW or DOCUMENTS, True, D, BLOCK_D, BLOCK_M,
            )  # fmt: skip
        state = _keys_over_queries(
            state, k, v, p_q_h, p_r_h, p_grad_h, p_terms_h, s_q, s_r, s_g, stride_terms,
            i_n, high, whole, masked, rows, SCALE, CAUSAL, WINDOW or DOCUMENTS, False, D, BLOCK_D, BLOCK_M,
        )  # fmt: skip
        if WINDOW or DOCUMENTS:
            state = _keys_over_queries(
                state, k, v, p_q_h, p_r_h, p_grad_h, p_terms_h, s_q, s_r, s_g, stride_terms,
                i_n, high, masked, end, rows, SCALE, CAUSAL, WINDOW or DOCUMENTS, True, D, BLOCK_D, BLOCK_M,
            )  # fmt: skip
    dk, dv = state
    put(p_dk + i_b * strides_dk[1] + i_g * strides_dk[2], strides_dk[0], i_n, keys, dk, D, BLOCK_D)
    put(p_dv + i_b * strides_dv[1] + i_g * strides_dv[2], strides_dv[0], i_n, keys, -dv, D, BLOCK_D)
