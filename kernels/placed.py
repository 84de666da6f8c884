"""Rows of this rank taken for others, and put together from its own and what others sent; see `context_parallel.transfer`.

Of up to three tensors in one launch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from megatron_lighthouse.kernels.launch import Launch, cdiv, enqueue, last_contiguous, launch, padded

MOST = 1024
"""Elements of a row that one program holds at a time."""
TOGETHER = 3
"""Tensors of a launch."""


@triton.jit
def _tensor_of(p_a, p_b, p_c, strides, widths):
    """The tensor of this program: pointer, stride and width; and the elements of a message before its own."""
    if tl.program_id(2) == 0:
        p_x, stride, width, before = p_a, strides[0], widths[0], widths[0] * 0
    elif tl.program_id(2) == 1:
        p_x, stride, width, before = p_b, strides[1], widths[1], widths[0]
    else:
        p_x, stride, width, before = p_c, strides[2], widths[2], widths[0] + widths[1]
    return p_x, stride, width, before


@triton.jit(repr=lambda _: "lighthouse_taken", do_not_specialize=["length"])
def taken_kernel(
    p_a,
    p_b,
    p_c,
    p_leaving,
    p_message,
    strides,
    widths,
    stride_message,
    length,
    BLOCK_W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (block of rows, block of their elements, tensor)."""
    i_row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i_w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    p_x, stride, width, before = _tensor_of(p_a, p_b, p_c, strides, widths)
    m_row, m_w = i_row < length, (i_w < width)[None, :]
    row = tl.load(p_leaving + i_row, mask=m_row, other=0).to(tl.int64)
    x = tl.load(p_x + row[:, None] * stride + i_w[None, :], mask=m_row[:, None] & m_w, other=0.0)
    p_message += i_row.to(tl.int64)[:, None] * stride_message + before + i_w[None, :]
    tl.store(p_message, x, mask=m_row[:, None] & m_w)


@triton.jit(repr=lambda _: "lighthouse_placed", do_not_specialize=["length"])
def placed_kernel(
    p_a,
    p_b,
    p_c,
    p_message,
    p_slots,
    p_out_a,
    p_out_b,
    p_out_c,
    strides,
    widths,
    stride_message,
    length,
    COPIES: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (block of rows, block of their elements, tensor)."""
    i_row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i_w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    p_own, stride, width, before = _tensor_of(p_a, p_b, p_c, strides, widths)
    p_out, _, _, _ = _tensor_of(p_out_a, p_out_b, p_out_c, strides, widths)
    m_row, m_w = i_row < length, (i_w < width)[None, :]
    total = tl.zeros([BLOCK, BLOCK_W], tl.float32)
    for _ in tl.static_range(COPIES):
        slot = tl.load(p_slots + i_row, mask=m_row, other=-1).to(tl.int64)
        p_slots += length
        m_own, m_other = slot >= 0, slot < -1
        row = tl.load(p_own + slot[:, None] * stride + i_w[None, :], mask=m_own[:, None] & m_w, other=0.0)
        p_other = p_message + (-2 - slot)[:, None] * stride_message + before + i_w[None, :]
        other = tl.load(p_other, mask=m_other[:, None] & m_w, other=0.0)
        total += tl.where(m_own[:, None], row, other).to(tl.float32)
    p_out += i_row.to(tl.int64)[:, None] * width + i_w[None, :]
    tl.store(p_out, total.to(p_out.dtype.element_ty), mask=m_row[:, None] & m_w)


def taken(rows: Sequence[Tensor], leaving: Tensor) -> Tensor:
    """See `megatron_lighthouse.context_parallel.transfer.taken`."""
    length = leaving.shape[0]  # len of a tensor is several calls
    message = rows[0].new_empty(length, sum([x.shape[1] for x in rows]))
    for few, part in _parts(rows, message):
        _launch(taken_kernel, few, (leaving, part), length, part)
    return message


def placed(rows: Sequence[Tensor], message: Tensor, slots: Tensor) -> list[Tensor]:
    """See `megatron_lighthouse.context_parallel.transfer.placed`."""
    copies, length = slots.shape
    made = list[Tensor]()
    for few, part in _parts(rows, message):
        out = [x.new_empty(length, x.shape[1]) for x in few]
        _launch(placed_kernel, few, (part, slots, *_three(out)), length, part, COPIES=copies)
        made += out
    return made


def _parts(rows: Sequence[Tensor], message: Tensor) -> Iterator[tuple[list[Tensor], Tensor]]:
    """A few tensors at a time, and what is theirs of the rows of a message."""
    before = 0
    for first in range(0, len(rows), TOGETHER):
        few = [last_contiguous(x) for x in rows[first : first + TOGETHER]]
        yield few, message[:, before:] if before else message
        before += sum(x.shape[1] for x in few)


def _three(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """As a kernel takes them: the last again in place of those that are not there."""
    return [*tensors, *[tensors[-1]] * (TOGETHER - len(tensors))]


def _launch(
    kernel: Any, rows: Sequence[Tensor], others: Sequence[Tensor], length: int, message: Tensor, **constants: int
) -> None:
    """Over `length` rows of each tensor."""
    if length == 0:
        return
    three = _three(rows)
    widths = tuple([x.shape[1] for x in three])
    blocks, shape, how = _blocks(widths, rows[0].element_size())
    enqueue(
        kernel,
        (cdiv(length, how.rows), blocks, len(rows)),
        (*three, *others),
        (tuple([x.stride(0) for x in three]), widths, message.stride(0), length),
        {**constants, **shape},
        num_warps=how.warps,
    )


@cache
def _blocks(widths: tuple[int, ...], itemsize: int) -> tuple[int, dict[str, int], Launch]:
    """Of rows so wide: blocks of elements; the kernels' constants; and the launch."""
    block = min(MOST, padded(max(widths)))
    how = launch("spread", block, itemsize)
    return cdiv(max(widths), block), {"BLOCK_W": block, "BLOCK": how.rows}, how
