"""Attended norms: how long the rows of causal attention are. Forward only, and the rows are never written.

Keys are taken in blocks from the first key on, by online softmax in fp32. The blocks of queries begin at whole multiples of
their size in the sequence, not in what a rank holds, and their sizes do not hang on any length: so the arithmetic of a row is
that of its position, whichever rank computes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lighthouse.kernels.launch import LOG2_E, cdiv, enqueue, last_contiguous, padded, strides
from megatron_lighthouse.ranges import profiled


class Blocks(NamedTuple):
    """Queries and keys that a program holds at a time, its warps, and how many blocks of keys are under way."""

    queries: int
    keys: int
    warps: int
    stages: int


def blocks_of(dim: int, itemsize: int) -> Blocks:
    """By D and the dtype alone; whole blocks of keys in one of queries. fp32 is multiplied without tensor cores, as exactly as
    fp32 can: smaller blocks."""
    if itemsize == 4:
        return Blocks(32, 16, 4, 2)
    return Blocks(128, 128, 8, 3) if padded(dim) <= 128 else Blocks(64, 64, 8, 2)


def constants_of(dim: int, scale: float, how: Blocks) -> dict[str, float]:
    """The constants of a kernel that attends, in its order. SCALE is of exponents of 2."""
    return {"SCALE": scale * LOG2_E, "D": dim, "BLOCK_D": padded(dim), "BLOCK_M": how.queries, "BLOCK_N": how.keys}


@triton.jit
def _rows(p_x, i_row, i_d, rows, D: tl.constexpr, BLOCK_D: tl.constexpr, LAST: tl.constexpr):
    """Rows of keys or values; LAST: some may lie past the end. Without a mask where there is nothing to mask."""
    if LAST:
        x = tl.load(p_x, mask=(i_row < rows)[:, None] & (i_d < D)[None, :], other=0.0)
    elif D < BLOCK_D:
        x = tl.load(p_x, mask=(i_d < D)[None, :], other=0.0)
    else:
        x = tl.load(p_x)
    return x


@triton.jit
def attend_to(
    state,
    q,
    p_k,
    p_v,
    stride_k,
    stride_v,
    i_position,
    begin,
    end,
    keys,
    SCALE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIAGONAL: tl.constexpr,
):
    """Online softmax (acc, total, best) over the keys begin..end - 1; DIAGONAL: not all rows see all of them."""
    acc, total, best = state
    i_n, i_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    p_k += (begin + i_n).to(tl.int64)[:, None] * stride_k + i_d[None, :]
    p_v += (begin + i_n).to(tl.int64)[:, None] * stride_v + i_d[None, :]
    for i_first in range(begin, end, BLOCK_N):
        k = _rows(p_k, i_first + i_n, i_d, keys, D, BLOCK_D, DIAGONAL)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee")
        if DIAGONAL:
            logits = tl.where(i_position[:, None] >= i_first + i_n[None, :], logits, float("-inf"))
        higher = tl.maximum(best, tl.max(logits, 1) * SCALE)
        # keys that a row does not see leave all of this as it was, to the last bit
        weights = tl.exp2(logits * SCALE - higher[:, None])
        shrink = tl.exp2(best - higher)
        total = total * shrink + tl.sum(weights, 1)
        v = _rows(p_v, i_first + i_n, i_d, keys, D, BLOCK_D, DIAGONAL)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        best = higher
        p_k += tl.cast(stride_k, tl.int64) * BLOCK_N
        p_v += tl.cast(stride_v, tl.int64) * BLOCK_N
    return acc, total, best


@triton.jit
def block_of_chunk(first, second, blocks, BLOCK_M: tl.constexpr):
    """Of program (block of a chunk, ·): the chunk, its first position, and that of the block, a multiple of BLOCK_M."""
    i_program = tl.num_programs(0) - 1 - tl.program_id(0)  # late blocks have the most keys: they are begun first
    i_chunk = i_program // blocks
    start = tl.where(i_chunk == 0, first, second)
    return i_chunk, start, (start // BLOCK_M + i_program % blocks) * BLOCK_M


@triton.jit(repr=lambda _: "lighthouse_attended", do_not_specialize=["first", "second", "length", "blocks", "chunks"])
def attended_kernel(
    p_q,
    p_k,
    p_v,
    p_squares,
    strides_q,
    strides_k,
    strides_v,
    first,
    second,
    length,
    blocks,
    chunks,
    keys,
    H,
    R,
    SCALE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Squared row norms [B, H, chunks * length]; program (block of a chunk, b * H + h). Chunks start at first and second."""
    i_chunk, start, i_first = block_of_chunk(first, second, blocks, BLOCK_M)
    i_b, i_h = tl.program_id(1) // H, tl.program_id(1) % H
    if i_first >= start + length:  # past the end of its chunk: the other chunk has a block more
        return
    i_position = i_first + tl.arange(0, BLOCK_M)
    i_row = i_position - start
    m_row = (i_row >= 0) & (i_row < length)
    i_row += i_chunk * length
    i_d = tl.arange(0, BLOCK_D)

    i_b, i_h, i_g = i_b.to(tl.int64), i_h.to(tl.int64), (i_h // R).to(tl.int64)
    p_q += i_b * strides_q[1] + i_h * strides_q[2]
    p_k += i_b * strides_k[1] + i_g * strides_k[2]
    p_v += i_b * strides_v[1] + i_g * strides_v[2]
    p_q += i_row.to(tl.int64)[:, None] * strides_q[0] + i_d[None, :]
    q = tl.load(p_q, mask=m_row[:, None] & (i_d < D)[None, :], other=0.0)
    acc, total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    state = (acc, total, tl.full([BLOCK_M], float("-inf"), tl.float32))
    end = tl.minimum(i_first + BLOCK_M, keys)
    state = attend_to(
        state, q, p_k, p_v, strides_k[0], strides_v[0], i_position, 0, i_first, keys, SCALE, D, BLOCK_D, BLOCK_N, False
    )
    acc, total, _ = attend_to(
        state, q, p_k, p_v, strides_k[0], strides_v[0], i_position, i_first, end, keys, SCALE, D, BLOCK_D, BLOCK_N, True
    )
    acc = acc / total[:, None]
    p_squares += tl.program_id(1).to(tl.int64) * (chunks * length)
    tl.store(p_squares + i_row, tl.sum(acc * acc, 1), mask=m_row)


def compute_squares(query: Tensor, key: Tensor, value: Tensor, starts: Sequence[int], scale: float) -> Tensor:
    """[B, H, n] fp32: the squared norms of the rows of attention, for `Steps.attended_norms`.

    Args:
        starts: the position in the sequence of the first token of each chunk of the queries; one chunk or two.
    """
    with profiled("attended_norms"):
        query, key, value = (last_contiguous(x) for x in (query, key, value))
        (rows, batch, heads, dim), (keys, _, groups, _) = query.shape, key.shape
        squares, length, how = _empty(query), rows // len(starts), blocks_of(dim, query.element_size())
        # a chunk may begin within a block
        blocks = max(cdiv(first % how.queries + length, how.queries) for first in starts)
        enqueue(
            attended_kernel,
            (blocks * len(starts), batch * heads, 1),
            (query, key, value, squares),
            (
                *(strides(x) for x in (query, key, value)),
                *(starts[0], starts[-1], length, blocks, len(starts), keys, heads, heads // groups),
            ),
            constants_of(dim, scale, how),
            num_warps=how.warps,
            num_stages=how.stages,
        )
        return squares


def _empty(query: Tensor) -> Tensor:
    rows, batch, heads, _ = query.shape
    return torch.empty((batch, heads, rows), dtype=torch.float32, device=query.device)


attended_op = torch.library.custom_op("lighthouse::attended_squares", compute_squares, mutates_args=())
attended_op.register_fake(lambda query, key, value, starts, scale: _empty(query))
