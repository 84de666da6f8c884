"""Merge: attention over two sets of keys, from the attention over each and its log-sum-exp; in place."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from megatron_lighthouse.kernels.launch import cdiv, enqueue, launch, padded, strides


@triton.jit(repr=lambda _: "lighthouse_merge")
def merge_kernel(
    p_out,
    p_part,
    p_lse,
    p_part_lse,
    strides_out,
    strides_part,
    strides_lse,
    strides_part_lse,
    length,
    H,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (block of rows, b * H + h)."""
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    p_out += i_b * strides_out[1] + i_h * strides_out[2]
    p_part += i_b * strides_part[1] + i_h * strides_part[2]
    i_row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i_d = tl.arange(0, BLOCK_D)
    m_row = i_row < length
    mask = m_row[:, None] & (i_d < D)[None, :]
    i_row64 = i_row.to(tl.int64)
    p_lse += i_b * strides_lse[0] + i_h * strides_lse[1] + i_row64 * strides_lse[2]
    p_part_lse += i_b * strides_part_lse[0] + i_h * strides_part_lse[1] + i_row64 * strides_part_lse[2]
    lse, part_lse = tl.load(p_lse, mask=m_row, other=0.0), tl.load(p_part_lse, mask=m_row, other=0.0)
    highest = tl.maximum(lse, part_lse)
    total = highest + tl.log(tl.exp(lse - highest) + tl.exp(part_lse - highest))
    p_out += i_row64[:, None] * strides_out[0] + i_d[None, :]
    p_part += i_row64[:, None] * strides_part[0] + i_d[None, :]
    out = tl.load(p_out, mask=mask, other=0.0).to(tl.float32) * tl.exp(lse - total)[:, None]
    out += tl.load(p_part, mask=mask, other=0.0).to(tl.float32) * tl.exp(part_lse - total)[:, None]
    tl.store(p_out, out.to(p_out.dtype.element_ty), mask=mask)
    tl.store(p_lse, total, mask=m_row)


def merge(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """See `megatron_lighthouse.context_parallel.merge`; log-sum-exps in fp32."""
    length, batch, heads, dim = out.shape
    how = launch("spread", dim, out.element_size())
    enqueue(
        merge_kernel,
        (cdiv(length, how.rows), batch * heads, 1),
        (out, part_out, lse, part_lse),
        (*(strides(x) for x in (out, part_out, lse, part_lse)), length, heads),
        {"D": dim, "BLOCK_D": padded(dim), "BLOCK": how.rows},
        num_warps=how.warps,
    )
