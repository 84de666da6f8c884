"""The forward pass: v̄, o = v̄ - C, t̄ and the log-sum-exp of a tile of queries, over tiles of keys by online softmax.

Of the keys so far a row holds their greatest logit, the sum of weights p, the mean of u, the sum of p v and that of
p (u - mean) v. A tile of keys moves the mean by d, and so the last by -d times that of p v. The output is formed here, in fp32:
C rounded to 16 bits first, and v̄, would be as much error again as the output's own rounding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lighthouse.kernels.launch import cdiv, enqueue, last_contiguous, strides
from megatron_lighthouse.kernels.parallax.tiles import (
    blocks_of,
    constants_of,
    first_seen,
    in_bulk,
    keys_of,
    loaded,
    on_hopper,
    put,
    seen,
    source,
    tile,
)


@triton.jit
def _over_keys(
    state,
    q,
    r,
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
    """The state over the keys begin..end - 1 too; MASKED: not all rows see all of them."""
    best, total, mean, values, products = state
    for i_first in range(begin, end, BLOCK_N):
        k = loaded(k_rows, stride_k, i_first, keys, BULK, D, BLOCK_D, BLOCK_N)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE
        u = tl.dot(r, tl.trans(k), input_precision="ieee")
        if MASKED:
            i_n = i_first + tl.arange(0, BLOCK_N)
            logits = tl.where(seen(i_m[:, None], i_n[None, :], low[:, None], keys, CAUSAL), logits, float("-inf"))
        higher = tl.maximum(best, tl.max(logits, 1))
        from_ = tl.where(higher == float("-inf"), 0.0, higher)  # of a row that has seen no key yet
        weights = tl.exp2(logits - from_[:, None])
        shrink = tl.exp2(best - from_)
        before = total * shrink
        total = before + tl.sum(weights, 1)
        moved = tl.sum(weights * (u - mean[:, None]), 1) / tl.where(total == 0.0, 1.0, total)
        mean += moved
        values *= shrink[:, None]
        products = products * shrink[:, None] - moved[:, None] * values
        v = loaded(v_rows, stride_v, i_first, keys, BULK, D, BLOCK_D, BLOCK_N)
        values = tl.dot(weights.to(v.dtype), v, values, input_precision="ieee")
        weights *= u - mean[:, None]
        products = tl.dot(weights.to(v.dtype), v, products, input_precision="ieee")
        best = higher
    return best, total, mean, values, products


@triton.jit(repr=lambda _: "parallax_forward", do_not_specialize=["rows", "keys"])
def forward_kernel(
    p_q,
    p_r,
    p_k,
    p_v,
    p_value,
    p_output,
    p_mean,
    p_lse,
    p_starts,
    strides_q,
    strides_r,
    strides_k,
    strides_v,
    strides_value,
    strides_output,
    strides_mean,
    strides_lse,
    rows,
    keys,
    H,
    R,
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
    """Program b * H + h of each tile of queries, the last tiles first: they see the most keys. SCALE is in powers of 2."""
    tiles = (rows + BLOCK_M - 1) // BLOCK_M
    heads = tl.num_programs(0) // tiles
    i_first = (tiles - 1 - tl.program_id(0) // heads) * BLOCK_M
    i_b, i_h = (tl.program_id(0) % heads // H).to(tl.int64), (tl.program_id(0) % heads % H).to(tl.int64)
    i_g = i_h // R
    p_q += i_b * strides_q[1] + i_h * strides_q[2]
    p_r += i_b * strides_r[1] + i_h * strides_r[2]
    s_k, s_v = strides_k[0], strides_v[0]
    k_rows = source(p_k + i_b * strides_k[1] + i_g * strides_k[2], s_k, keys, BULK, D, BLOCK_D, BLOCK_N)
    v_rows = source(p_v + i_b * strides_v[1] + i_g * strides_v[2], s_v, keys, BULK, D, BLOCK_D, BLOCK_N)
    i_m = i_first + tl.arange(0, BLOCK_M)
    q = tile(p_q, strides_q[0], i_m, rows, D, BLOCK_D)
    r = tile(p_r, strides_r[0], i_m, rows, D, BLOCK_D)

    best, zeros = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    state = (best, zeros, zeros, acc, acc)
    i_last = tl.minimum(i_first + BLOCK_M, rows) - 1
    low = first_seen(p_starts, tl.minimum(i_m, rows - 1), WINDOW, DOCUMENTS)
    low_first, low_last = (first_seen(p_starts, i_first, WINDOW, DOCUMENTS), first_seen(p_starts, i_last, WINDOW, DOCUMENTS))
    begin, whole, masked, end = keys_of(i_first, low_first, low_last, keys, BLOCK_M, BLOCK_N, CAUSAL)
    if WINDOW or DOCUMENTS:
        state = _over_keys(
            state, q, r, k_rows, v_rows, s_k, s_v, i_m, low, begin, whole, keys, SCALE, CAUSAL, True, BULK, D, BLOCK_D, BLOCK_N
        )
    state = _over_keys(
        state, q, r, k_rows, v_rows, s_k, s_v, i_m, low, whole, masked, keys, SCALE, CAUSAL, False, BULK, D, BLOCK_D, BLOCK_N
    )
    state = _over_keys(
        state, q, r, k_rows, v_rows, s_k, s_v, i_m, low, masked, end, keys, SCALE, CAUSAL, True, BULK, D, BLOCK_D, BLOCK_N
    )
    best, total, mean, values, products = state
    total = tl.where(total == 0.0, 1.0, total)  # rows past the end may see nothing

    m_row, i_m64 = i_m < rows, i_m.to(tl.int64)
    p_value += i_b * strides_value[1] + i_h * strides_value[2]
    p_output += i_b * strides_output[1] + i_h * strides_output[2]
    put(p_value, strides_value[0], i_m, rows, values / total[:, None], D, BLOCK_D)
    put(p_output, strides_output[0], i_m, rows, (values - products) / total[:, None], D, BLOCK_D)
    p_mean += i_b * strides_mean[1] + i_h * strides_mean[2]
    p_lse += i_b * strides_lse[0] + i_h * strides_lse[1]
    tl.store(p_mean + i_m64 * strides_mean[0], mean, mask=m_row)
    tl.store(p_lse + i_m64 * strides_lse[2], (best + tl.log2(total)) * 0.6931471805599453, mask=m_row)


def forward(
    query: Tensor,
    r: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
    causal: bool,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """v̄ and o [n, B, H, D] in the inputs' dtype, t̄ [n, B, H, 1] and the log-sum-exp [B, H, n] in fp32.

    Args:
        query, r: [n, B, H, D]; key, value: [m, B, G, D], centred. bf16, fp16 or fp32.
        causal: near and far rows are the same, and see those up to their own.
        window: of so many keys; with `causal` alone.
        starts: [n] int32, the first token of the document of each; likewise. One document by default.
    """
    rows, batch, heads, dim = query.shape
    query, r, key, value = (last_contiguous(x) for x in (query, r, key, value))
    blocks = blocks_of("forward", dim, query.element_size(), on_hopper(query))
    of_value, output = (query.new_empty(query.shape) for _ in range(2))
    mean = query.new_empty(rows, batch, heads, 1, dtype=torch.float32)
    lse = query.new_empty(batch, heads, rows, dtype=torch.float32)
    tensors = [query, r, key, value, of_value, output, mean, lse]
    enqueue(
        forward_kernel,
        (cdiv(rows, blocks.queries) * batch * heads, 1, 1),
        [*tensors, lse if starts is None else starts],
        (*(strides(x) for x in tensors), rows, key.shape[0], heads, heads // key.shape[2]),
        constants_of(dim, scale, window, causal, blocks, starts is not None, in_bulk(key, value)),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return of_value, output, mean, lse
