"""The forward pass: output and log-sum-exp of a tile of queries, over its own keys, then over earlier tiles back to `first`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lighthouse.kernels.launch import cdiv, enqueue, last_contiguous, strides
from megatron_lighthouse.kernels.parallax.tiles import put, tile
from megatron_lighthouse.kernels.wall.prepare import prepare
from megatron_lighthouse.kernels.wall.tiles import (
    between,
    blocks_of,
    constants_of,
    near_logits,
    scalars,
    scalars_after,
)


@triton.jit(repr=lambda _: "wall_forward", do_not_specialize=["rows"])
def forward_kernel(
    p_q,
    p_k,
    p_v,
    p_gate,
    p_scalar,
    p_near,
    p_far,
    p_totals,
    p_out,
    p_lse,
    p_first,
    strides_q,
    strides_k,
    strides_v,
    strides_gate,
    strides_scalar,
    strides_near,
    strides_far,
    strides_totals,
    strides_out,
    strides_lse,
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
    """Program b * H + h of each tile of queries. SCALE is in powers of 2."""
    tiles = (rows + ROWS - 1) // ROWS
    heads = tl.num_programs(0) // tiles
    i_tile, i_head = tl.program_id(0) // heads, (tl.program_id(0) % heads).to(tl.int64)
    i_b, i_h = i_head // H, i_head % H
    i_g = i_h // R
    i, i_k = tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    i_m = i_tile * ROWS + i
    m_row, i_m64 = i_m < rows, i_m.to(tl.int64)
    p_gate += i_b * strides_gate[1] + i_h * strides_gate[2]
    p_v += i_b * strides_v[1] + i_g * strides_v[2]
    first = tl.load(p_first + i_m, mask=m_row, other=0)

    logits = near_logits(
        p_q + i_b * strides_q[1] + i_h * strides_q[2], p_k + i_b * strides_k[1] + i_g * strides_k[2], p_gate,
        strides_q[0], strides_k[0], strides_gate[0], i_m, rows, WIDE, K, BLOCK_K, POWER, ROWS,
    ) * SCALE  # fmt: skip
    if SCALAR:
        p_scalar += i_b * strides_scalar[1] + i_h * strides_scalar[2]
        scalar = scalars(p_scalar, strides_scalar[0], i_m, rows)
        logits += between(scalar, ROWS) * 1.4426950408889634
        scalar_before, scalar_between = tl.cumsum(scalar, 0), 0.0
    visible = (i[:, None] >= i[None, :]) & (i_m[None, :] >= first[:, None])
    logits = tl.where(visible, logits, float("-inf"))
    best = tl.max(logits, 1)  # a row sees itself
    weights = tl.exp2(logits - best[:, None])
    total = tl.sum(weights, 1)
    v = tile(p_v, strides_v[0], i_m, rows, V, BLOCK_V)
    acc = tl.dot(weights.to(v.dtype), v, input_precision="ieee")

    q = tile(p_near + i_b * strides_near[1] + i_h * strides_near[2], strides_near[0], i_m, rows, K, BLOCK_K)
    p_far += i_b * strides_far[1] + i_h * strides_far[2]
    p_totals += (i_tile - 1).to(tl.int64) * strides_totals[0] + i_b * strides_totals[1] + i_h * strides_totals[2]
    exponent = tl.zeros([BLOCK_K], tl.float32)
    for back in range(1, i_tile - tl.load(p_first + i_tile * ROWS) // ROWS + 1):
        i_far = i_tile - back
        i_n = i_far * ROWS + i
        q_far = (q * tl.exp(exponent)[None, :]).to(q.dtype)
        logits = tl.dot(q_far, tl.trans(tile(p_far, strides_far[0], i_n, rows, K, BLOCK_K)), input_precision="ieee") * SCALE
        if SCALAR:
            scalar_after = scalars_after(p_scalar, strides_scalar[0], i_n, rows, ROWS)
            logits += (scalar_before[:, None] + scalar_after[None, :] + scalar_between) * 1.4426950408889634
            scalar_between += tl.sum(scalars(p_scalar, strides_scalar[0], i_n, rows), 0)
        logits = tl.where(i_n[None, :] >= first[:, None], logits, float("-inf"))
        higher = tl.maximum(best, tl.max(logits, 1))
        weights = tl.exp2(logits - higher[:, None])
        shrink = tl.exp2(best - higher)
        total = total * shrink + tl.sum(weights, 1)
        v = tile(p_v, strides_v[0], i_n, rows, V, BLOCK_V)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        best = higher
        exponent += tl.load(p_totals + i_k, mask=i_k < K, other=0.0)
        p_totals -= strides_totals[0]

    put(p_out + i_b * strides_out[1] + i_h * strides_out[2], strides_out[0], i_m, rows, acc / total[:, None], V, BLOCK_V)
    p_lse += i_b * strides_lse[0] + i_h * strides_lse[1] + i_m64 * strides_lse[2]
    tl.store(p_lse, (best + tl.log2(total)) * 0.6931471805599453, mask=m_row)


def forward(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor, scalar_gate: Tensor | None, scale: float, first: Tensor
) -> tuple[Tensor, Tensor]:
    """See `megatron_lighthouse.wall.diagonal`; bf16, fp32, or fp16 under the interpreter; K and V up to 256."""
    rows, batch, heads, dim = query.shape
    query, key, value, gate = (last_contiguous(x) for x in (query, key, value, gate))
    widest = max(dim, value.shape[3])
    blocks = blocks_of("forward", widest, query.element_size())
    prepared = prepare(query, key, gate, blocks_of("prepare", widest, query.element_size()))
    out = torch.empty(rows, batch, heads, value.shape[3], dtype=query.dtype, device=query.device)
    lse = torch.empty(batch, heads, rows, dtype=torch.float32, device=query.device)
    tensors = [query, key, value, gate, gate if scalar_gate is None else scalar_gate, *prepared, out, lse]
    enqueue(
        forward_kernel,
        (cdiv(rows, blocks.rows) * batch * heads, 1, 1),
        [*tensors, first.contiguous()],
        (*(strides(x) for x in tensors), rows, heads, heads // key.shape[2]),
        constants_of(query, value, scale, scalar_gate is not None, blocks.rows),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return out, lse
