"""The backward pass in two kernels: by tiles of queries, which sum dq and dr, and by tiles of keys, which sum dk and dv.

With t = dO·o, b = dO·v̄ and a = dO·v: the gradients of logits are p ((a - t) + (t̄ - u) (a - b)), those of u -p (a - b). The
first kernel writes t and b for the second, which sums over the query heads of a key/value head in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lighthouse.kernels.launch import cdiv, enqueue, last_contiguous, strides
from megatron_lighthouse.kernels.parallax.tiles import blocks_of, constants_of, keys_of, put, seen, tile


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
    begin,
    end,
    keys,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
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
            weights = tl.where(seen(i_m, i_n, keys, WINDOW, CAUSAL), weights, 0.0)
        below = mean[:, None] - tl.dot(r, tl.trans(k), input_precision="ieee")
        v = tile(p_v, stride_v, i_n, keys, D, BLOCK_D)
        along = tl.dot(g, tl.trans(v), input_precision="ieee")
        past = along - of_value[:, None]
        of_logits = weights * (along - of_output[:, None] + below * past)
        dq = tl.dot(of_logits.to(k.dtype), k, dq, input_precision="ieee")
        dr = tl.dot((weights * past).to(k.dtype), k, dr, input_precision="ieee")
    return dq, dr


@triton.jit(repr=lambda _: "parallax_backward_queries", do_not_specialize=["rows", "keys"])
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
    begin, whole, masked, end = keys_of(i_first, keys, BLOCK_M, BLOCK_N, WINDOW, CAUSAL)
    if WINDOW:
        state = _queries_over_keys(
            state, q, r, g, mean, lse, of_output, of_value, p_k, p_v, s_k, s_v, i_m, begin, whole, keys,
            SCALE, WINDOW, CAUSAL, True, D, BLOCK_D, BLOCK_N,
        )  # fmt: skip
    state = _queries_over_keys(
        state, q, r, g, mean, lse, of_output, of_value, p_k, p_v, s_k, s_v, i_m, whole, masked, keys,
        SCALE, WINDOW, CAUSAL, False, D, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    dq, dr = _queries_over_keys(
        state, q, r, g, mean, lse, of_output, of_value, p_k, p_v, s_k, s_v, i_m, masked, end, keys,
        SCALE, WINDOW, CAUSAL, True, D, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    scale: tl.constexpr = SCALE * 0.6931471805599453
    put(p_dq + i_b * strides_dq[1] + i_h * strides_dq[2], strides_dq[0], i_m, rows, dq * scale, D, BLOCK_D)
    put(p_dr + i_b * strides_dr[1] + i_h * strides_dr[2], strides_dr[0], i_m, rows, -dr, D, BLOCK_D)


@triton.jit
def _keys_over_queries(
    state,
    k,
    v,
    p_q,
    p_r,
    p_grad,
    p_mean,
    p_lse,
    p_of_output,
    p_of_value,
    stride_q,
    stride_r,
    stride_grad,
    stride_mean,
    stride_lse,
    i_n,
    begin,
    end,
    rows,
    keys,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """dk and dv over the queries begin..end - 1 of a head too."""
    dk, dv = state
    scale: tl.constexpr = SCALE * 0.6931471805599453
    for i_first in range(begin, end, BLOCK_M):
        i_m = i_first + tl.arange(0, BLOCK_M)
        m_row, i_m64 = i_m < rows, i_m.to(tl.int64)
        q = tile(p_q, stride_q, i_m, rows, D, BLOCK_D)
        lse = tl.load(p_lse + i_m64 * stride_lse, mask=m_row, other=0.0) * 1.4426950408889634
        weights = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE - lse[:, None])
        if MASKED:
            weights = tl.where(seen(i_m, i_n, keys, WINDOW, CAUSAL) & m_row[:, None], weights, 0.0)
        r = tile(p_r, stride_r, i_m, rows, D, BLOCK_D)
        mean = tl.load(p_mean + i_m64 * stride_mean, mask=m_row, other=0.0)
        below = mean[:, None] - tl.dot(r, tl.trans(k), input_precision="ieee")
        g = tile(p_grad, stride_grad, i_m, rows, D, BLOCK_D)
        dv = tl.dot(tl.trans((weights * (1 + below)).to(g.dtype)), g, dv, input_precision="ieee")
        along = tl.dot(g, tl.trans(v), input_precision="ieee")
        past = along - tl.load(p_of_value + i_m64, mask=m_row, other=0.0)[:, None]
        over = along - tl.load(p_of_output + i_m64, mask=m_row, other=0.0)[:, None]
        of_logits = weights * (over + below * past) * scale
        dk = tl.dot(tl.trans(of_logits.to(q.dtype)), q, dk, input_precision="ieee")
        dk = tl.dot(tl.trans((-weights * past).to(q.dtype)), r, dk, input_precision="ieee")
    return dk, dv


@triton.jit(repr=lambda _: "parallax_backward_keys", do_not_specialize=["rows", "keys"])
def keys_kernel(
    p_q,
    p_r,
    p_k,
    p_v,
    p_grad,
    p_mean,
    p_lse,
    p_dk,
    p_dv,
    p_of_output,
    p_of_value,
    strides_q,
    strides_r,
    strides_k,
    strides_v,
    strides_grad,
    strides_mean,
    strides_lse,
    strides_dk,
    strides_dv,
    rows,
    keys,
    H,
    R,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
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

    begin, whole, masked, end = 0, 0, rows // BLOCK_M * BLOCK_M, rows
    if CAUSAL:
        begin = i_first // BLOCK_M * BLOCK_M
        whole = tl.minimum((i_first + BLOCK_N - 1 + BLOCK_M - 1) // BLOCK_M * BLOCK_M, rows)
    if WINDOW:
        end = tl.minimum(i_first + BLOCK_N + WINDOW - 1, rows)
        masked = tl.minimum(masked, (i_first + WINDOW) // BLOCK_M * BLOCK_M)
        whole = tl.minimum(whole, end)
    masked = tl.maximum(masked, whole)
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    state = (acc, acc)
    for i_of_group in range(R):
        i_h = i_g * R + i_of_group
        p_q_h = p_q + i_b * strides_q[1] + i_h * strides_q[2]
        p_r_h = p_r + i_b * strides_r[1] + i_h * strides_r[2]
        p_grad_h = p_grad + i_b * strides_grad[1] + i_h * strides_grad[2]
        p_mean_h = p_mean + i_b * strides_mean[1] + i_h * strides_mean[2]
        p_lse_h = p_lse + i_b * strides_lse[0] + i_h * strides_lse[1]
        p_output_h, p_value_h = p_of_output + (i_b * H + i_h) * rows, p_of_value + (i_b * H + i_h) * rows
        s_q, s_r, s_g, s_m, s_l = strides_q[0], strides_r[0], strides_grad[0], strides_mean[0], strides_lse[2]
        if CAUSAL:
            state = _keys_over_queries(
                state, k, v, p_q_h, p_r_h, p_grad_h, p_mean_h, p_lse_h, p_output_h, p_value_h, s_q, s_r, s_g, s_m, s_l,
                i_n, begin, whole, rows, keys, SCALE, WINDOW, CAUSAL, True, D, BLOCK_D, BLOCK_M,
            )  # fmt: skip
        state = _keys_over_queries(
            state, k, v, p_q_h, p_r_h, p_grad_h, p_mean_h, p_lse_h, p_output_h, p_value_h, s_q, s_r, s_g, s_m, s_l,
            i_n, whole, masked, rows, keys, SCALE, WINDOW, CAUSAL, False, D, BLOCK_D, BLOCK_M,
        )  # fmt: skip
        state = _keys_over_queries(
            state, k, v, p_q_h, p_r_h, p_grad_h, p_mean_h, p_lse_h, p_output_h, p_value_h, s_q, s_r, s_g, s_m, s_l,
            i_n, masked, end, rows, keys, SCALE, WINDOW, CAUSAL, True, D, BLOCK_D, BLOCK_M,
        )  # fmt: skip
    dk, dv = state
    put(p_dk + i_b * strides_dk[1] + i_g * strides_dk[2], strides_dk[0], i_n, keys, dk, D, BLOCK_D)
    put(p_dv + i_b * strides_dv[1] + i_g * strides_dv[2], strides_dv[0], i_n, keys, dv, D, BLOCK_D)


def backward(
    grad: Tensor,
    near: tuple[Tensor, Tensor],
    far: tuple[Tensor, Tensor],
    averages: tuple[Tensor, Tensor, Tensor],
    lse: Tensor,
    scale: float,
    window: int | None,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dr, dk and dv in the inputs' dtype; arguments as `forward` takes and gives them, of whole rows."""
    rows, batch, heads, dim = near[0].shape
    query, r, key, value, grad = (last_contiguous(x) for x in (*near, *far, grad))
    of_value, covariance = (last_contiguous(x) for x in averages[:2])
    mean = averages[2]
    dq, dr, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, r, key, value))
    sums = [lse.new_empty(batch, heads, rows, dtype=torch.float32) for _ in range(2)]
    shape = (rows, key.shape[0], heads, heads // key.shape[2])
    blocks = blocks_of("queries", dim, query.element_size())
    tensors = [query, r, key, value, grad, of_value, covariance, mean, lse, dq, dr]
    enqueue(
        queries_kernel,
        (cdiv(rows, blocks.queries) * batch * heads, 1, 1),
        [*tensors, *sums],
        (*(strides(x) for x in tensors), *shape),
        constants_of(dim, scale, window, causal, blocks),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    blocks = blocks_of("keys", dim, query.element_size())
    tensors = [query, r, key, value, grad, mean, lse, dk, dv]
    enqueue(
        keys_kernel,
        (cdiv(key.shape[0], blocks.keys) * batch * key.shape[2], 1, 1),
        [*tensors, *sums],
        (*(strides(x) for x in tensors), *shape),
        constants_of(dim, scale, window, causal, blocks),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return dq, dr, dk, dv
