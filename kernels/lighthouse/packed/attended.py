"""Attended norms over packed documents: as `kernels.lighthouse.attended`, all documents in one launch, none seeing another.

A document's blocks of queries begin at its first row, so its arithmetic is what it is alone, to the last bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lighthouse.gpu import capability_of
from megatron_lighthouse.kernels.launch import cdiv, enqueue, last_contiguous, strides
from megatron_lighthouse.kernels.lighthouse.attended import Blocks, attend_to, blocks_of, constants_of
from megatron_lighthouse.lighthouse.packed.steps import Runs, runs_of
from megatron_lighthouse.ranges import profiled
from megatron_lighthouse.sequence.documents import Documents
from megatron_lighthouse.softmax.base import scale_of


@triton.jit(repr=lambda _: "lighthouse_packed_attended", do_not_specialize=["rows"])
def packed_attended_kernel(
    p_q,
    p_k,
    p_v,
    p_squares,
    p_blocks,
    p_bounds,
    strides_q,
    strides_k,
    strides_v,
    H,
    R,
    rows,
    SCALE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Squared row norms [B, H, rows]; program (block of a document, b * H + h), of which `p_blocks` has document and number."""
    i_document = tl.load(p_blocks + 2 * tl.program_id(0))
    i_first = tl.load(p_blocks + 2 * tl.program_id(0) + 1) * BLOCK_M
    start = tl.load(p_bounds + i_document)
    keys = tl.load(p_bounds + i_document + 1) - start
    i_b, i_h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    i_g = (i_h // R).to(tl.int64)
    i_position, i_d = i_first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    p_q += start.to(tl.int64) * strides_q[0] + i_b * strides_q[1] + i_h.to(tl.int64) * strides_q[2]
    p_k += start.to(tl.int64) * strides_k[0] + i_b * strides_k[1] + i_g * strides_k[2]
    p_v += start.to(tl.int64) * strides_v[0] + i_b * strides_v[1] + i_g * strides_v[2]
    p_q += i_position.to(tl.int64)[:, None] * strides_q[0] + i_d[None, :]
    q = tl.load(p_q, mask=(i_position < keys)[:, None] & (i_d < D)[None, :], other=0.0)
    acc, total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    state = (acc, total, tl.full([BLOCK_M], float("-inf"), tl.float32))
    end = tl.minimum(i_first + BLOCK_M, keys)
    stride_k, stride_v = strides_k[0], strides_v[0]
    state = attend_to(state, q, p_k, p_v, stride_k, stride_v, i_position, 0, i_first, keys, SCALE, D, BLOCK_D, BLOCK_N, False)
    acc, total, _ = attend_to(
        state, q, p_k, p_v, stride_k, stride_v, i_position, i_first, end, keys, SCALE, D, BLOCK_D, BLOCK_N, True
    )
    acc = acc / total[:, None]
    p_squares += tl.program_id(1).to(tl.int64) * rows + start
    tl.store(p_squares + i_position, tl.sum(acc * acc, 1), mask=i_position < keys)


def compute_packed_squares(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    runs: Runs | None = None,
    scale: float | None = None,
) -> Tensor:
    """[B, H, n] fp32: the squared norms of the rows of attention, for `PackedSteps.attended_norms`."""
    with profiled("attended_norms"):
        query, key, value = (last_contiguous(x) for x in (query, key, value))
        (rows, batch, heads, dim), groups = query.shape, key.shape[2]
        squares = torch.empty((batch, heads, rows), dtype=torch.float32, device=query.device)
        how = blocks_of(dim, query.element_size())
        blocks = _blocks(documents, how.queries, runs)
        enqueue(
            packed_attended_kernel,
            (len(blocks), batch * heads, 1),
            (query, key, value, squares, blocks, documents.cu_seqlens),
            (strides(query), strides(key), strides(value), heads, heads // groups, rows),
            constants_of(dim, scale_of(query, scale), how),
            num_warps=how.warps,
            num_stages=stages_on(capability_of(query.device), how),
        )
        return squares


def stages_on(capability: int, how: Blocks) -> int:
    """Blocks of keys under way: with a third, Blackwell's assembler spills."""
    return min(2, how.stages) if capability >= 100 else how.stages


def _blocks(documents: Documents, size: int, runs: Runs | None) -> Tensor:
    """[blocks, 2] int32: document and number of each block of queries that has a row of `runs`; late ones, which have the most
    keys, first."""
    known: dict[tuple[int, Runs | None], Tensor] = vars(documents).setdefault("blocks", {})
    if (size, runs) not in known:
        every = runs_of(documents) if runs is None else runs
        found = {(i, block) for i, first, end in every for block in range(first // size, cdiv(end, size)) if first < end}
        blocks = sorted(found, key=lambda x: (-x[1], x[0]))
        table = torch.tensor(blocks, dtype=torch.int32).view(-1, 2)
        known[size, runs] = table.to(documents.cu_seqlens.device, non_blocking=True)
    return known[size, runs]
