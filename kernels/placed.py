"""Placed: rows put together from those of this rank and those that others sent; see `context_parallel.transfer`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from megatron_lighthouse.kernels.launch import cdiv, enqueue, last_contiguous, launch, padded

MOST = 1024
"""Elements of a row that one program holds at a time."""


@triton.jit(repr=lambda _: "lighthouse_placed")
def placed_kernel(
    p_own,
    p_others,
    p_slots,
    p_out,
    stride_own,
    stride_others,
    length,
    W,
    COPIES: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (block of rows, block of their elements)."""
    i_row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i_w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    m_row, m_w = i_row < length, (i_w < W)[None, :]
    total = tl.zeros([BLOCK, BLOCK_W], tl.float32)
    for _ in tl.static_range(COPIES):
        slot = tl.load(p_slots + i_row, mask=m_row, other=-1)
        p_slots += length
        slot = slot.to(tl.int64)
        m_own, m_other = slot >= 0, slot < -1
        row = tl.load(p_own + slot[:, None] * stride_own + i_w[None, :], mask=m_own[:, None] & m_w, other=0.0)
        other = (-2 - slot)[:, None] * stride_others
        other_row = tl.load(p_others + other + i_w[None, :], mask=m_other[:, None] & m_w, other=0.0)
        total += tl.where(m_own[:, None], row, other_row).to(tl.float32)
    p_out += i_row.to(tl.int64)[:, None] * W + i_w[None, :]
    tl.store(p_out, total.to(p_out.dtype.element_ty), mask=m_row[:, None] & m_w)


def placed(own: Tensor, others: Tensor, slots: Tensor) -> Tensor:
    """See `megatron_lighthouse.context_parallel.transfer.placed`."""
    own, others = last_contiguous(own), last_contiguous(others)
    (copies, length), width = slots.shape, own.shape[1]
    out = own.new_empty(length, width)
    block = min(MOST, padded(width))
    how = launch("spread", block, own.element_size())
    enqueue(
        placed_kernel,
        (cdiv(length, how.rows), cdiv(width, block), 1),
        (own, others, slots, out),
        (own.stride(0), others.stride(0), length, width),
        {"COPIES": copies, "BLOCK_W": block, "BLOCK": how.rows},
        num_warps=how.warps,
    )
    return out
