"""Mass: one attention among coarsest windows, of which no rows are made, only who gives how much to whom. Forward only.

`rows` takes keys in blocks by online softmax, in fp32, and leaves each row's log-sum-exp; `columns` goes by keys, over the
queries of their tile. Blocks begin at whole multiples of their size, of the sequence for rows and of the tile for columns, and
what is masked is an exact 0: so the arithmetic is that of the place in the sequence, whichever rank computes it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lighthouse.kernels.launch import cdiv, enqueue, last_contiguous, run, strides
from megatron_lighthouse.kernels.lighthouse.attended import Blocks, block_of_chunk, blocks_of, constants_of
from megatron_lighthouse.kernels.lighthouse.mass_finer import chunks_of, finer
from megatron_lighthouse.lighthouse.reference import chunk_starts
from megatron_lighthouse.ranges import profiled
from megatron_lighthouse.sequence.layout import Layout
from megatron_lighthouse.softmax.base import scale_of

__all__ = ["columns", "finer", "rows"]


@triton.jit
def _tile(p_x, stride, i_row, i_d, rows, D: tl.constexpr):
    """Rows of D elements; those past the end are 0."""
    p_x += i_row.to(tl.int64)[:, None] * stride + i_d[None, :]
    return tl.load(p_x, mask=(i_row < rows)[:, None] & (i_d < D)[None, :], other=0.0)


@triton.jit
def _over_keys(
    state,
    q,
    p_k,
    stride_k,
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
    """Online softmax (total, best) over the keys begin..end - 1; DIAGONAL: some are not before all rows."""
    total, best = state
    i_d = tl.arange(0, BLOCK_D)
    for i_first in range(begin, end, BLOCK_N):
        i_n = i_first + tl.arange(0, BLOCK_N)
        logits = tl.dot(q, tl.trans(_tile(p_k, stride_k, i_n, i_d, keys, D)), input_precision="ieee") * SCALE
        if DIAGONAL:
            logits = tl.where(i_position[:, None] > i_n[None, :], logits, float("-inf"))
        higher = tl.maximum(best, tl.max(logits, 1))
        from_ = tl.where(higher == float("-inf"), 0.0, higher)  # of a row that has seen no key yet
        total = total * tl.exp2(best - from_) + tl.sum(tl.exp2(logits - from_[:, None]), 1)
        best = higher
    return total, best


@triton.jit(repr=lambda _: "lighthouse_mass_rows", do_not_specialize=["first", "second", "length", "blocks", "chunks"])
def rows_kernel(
    p_q,
    p_k,
    p_lse,
    p_peak,
    strides_q,
    strides_k,
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
    """Both [B, H, chunks * length], the first in powers of 2; program (block of a chunk, b * H + h), as of attended norms."""
    i_chunk, start, i_first = block_of_chunk(first, second, blocks, BLOCK_M)
    i_b, i_h = tl.program_id(1) // H, tl.program_id(1) % H
    if i_first >= start + length:  # past the end of its chunk: the other chunk has a block more
        return
    i_position = i_first + tl.arange(0, BLOCK_M)
    i_row, i_d = i_position - start, tl.arange(0, BLOCK_D)
    m_row = (i_row >= 0) & (i_row < length)
    i_row += i_chunk * length
    i_b, i_h, i_g = i_b.to(tl.int64), i_h.to(tl.int64), (i_h // R).to(tl.int64)
    p_q += i_b * strides_q[1] + i_h * strides_q[2]
    p_k += i_b * strides_k[1] + i_g * strides_k[2]
    p_q += i_row.to(tl.int64)[:, None] * strides_q[0] + i_d[None, :]
    q = tl.load(p_q, mask=m_row[:, None] & (i_d < D)[None, :], other=0.0)
    state = (tl.zeros([BLOCK_M], tl.float32), tl.full([BLOCK_M], float("-inf"), tl.float32))
    end = tl.minimum(i_first + BLOCK_M, keys)
    state = _over_keys(state, q, p_k, strides_k[0], i_position, 0, i_first, keys, SCALE, D, BLOCK_D, BLOCK_N, False)
    total, best = _over_keys(state, q, p_k, strides_k[0], i_position, i_first, end, keys, SCALE, D, BLOCK_D, BLOCK_N, True)
    i_out = tl.program_id(1).to(tl.int64) * (chunks * length) + i_row
    some = tl.where(total == 0.0, 1.0, total)  # the first row sees no key
    tl.store(p_lse + i_out, best + tl.log2(some), mask=m_row)
    tl.store(p_peak + i_out, tl.where(total == 0.0, 0.0, 1.0 / some), mask=m_row)


@triton.jit(repr=lambda _: "lighthouse_mass_columns", do_not_specialize=["first", "second", "length"])
def columns_kernel(
    p_q,
    p_k,
    p_lse,
    p_mass,
    strides_q,
    strides_k,
    first,
    second,
    length,
    rows,
    tile,
    blocks,
    H,
    R,
    SCALE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """[B, G, rows]; program (block of keys of a tile, b * G + g). Made where keys are of the chunks at first and second."""
    begin = tl.program_id(0) // blocks * tile
    i_first, end = begin + tl.program_id(0) % blocks * BLOCK_N, tl.minimum(begin + tile, rows)
    last = tl.minimum(i_first + BLOCK_N, end)
    if (last <= first) | ((i_first >= first + length) & (last <= second)) | (i_first >= second + length):
        return
    if i_first >= end:
        return
    G = H // R
    i_b, i_g = (tl.program_id(1) // G).to(tl.int64), (tl.program_id(1) % G).to(tl.int64)
    i_n, i_d = i_first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    k = _tile(p_k + i_b * strides_k[1] + i_g * strides_k[2], strides_k[0], i_n, i_d, end, D)
    total = tl.zeros([BLOCK_N], tl.float32)
    for r in range(R):
        i_h = i_g * R + r
        p_head, p_row = p_q + i_b * strides_q[1] + i_h * strides_q[2], p_lse + (i_b * H + i_h) * rows
        for i_query in range(i_first, end, BLOCK_M):
            i_m = i_query + tl.arange(0, BLOCK_M)
            logits = tl.dot(_tile(p_head, strides_q[0], i_m, i_d, end, D), tl.trans(k), input_precision="ieee") * SCALE
            lse = tl.load(p_row + i_m, mask=i_m < end, other=0.0)
            seen = (i_m[:, None] > i_n[None, :]) & (i_m < end)[:, None]
            total += tl.sum(tl.exp2(tl.where(seen, logits - lse[:, None], float("-inf"))), 0)
    tl.store(p_mass + tl.program_id(1).to(tl.int64) * rows + i_n, total, mask=i_n < end)


def rows(query: Tensor, key: Tensor, layout: Layout | None, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """See `mass_reference.rows`; the log-sum-exp is in powers of 2."""
    starts, scale = chunk_starts(query.shape[0], layout), scale_of(query, scale)
    lse, peak = run(rows_op, compute_rows, query.detach(), key.detach(), starts, scale)
    return lse, peak


def columns(query: Tensor, key: Tensor, lse: Tensor, tile: int, layout: Layout | None, scale: float | None = None) -> Tensor:
    """See `mass_reference.columns`, with the log-sum-exp of `rows` here."""
    chunks = [*chunks_of(key.shape[0], layout, layout.size if layout else 1)]
    return run(columns_op, compute_columns, query.detach(), key.detach(), lse, tile, chunks, scale_of(query, scale))


def compute_rows(query: Tensor, key: Tensor, starts: Sequence[int], scale: float) -> tuple[Tensor, Tensor]:
    """As `rows`; `starts`: the position in the sequence of the first row of each chunk of the queries, one or two."""
    with profiled("mass"):
        query, key = last_contiguous(query), last_contiguous(key)
        (count, batch, heads, dim), (keys, _, groups, _) = query.shape, key.shape
        lse, peak = _empty_rows(query)
        length, how = count // len(starts), blocks_of(dim, query.element_size())
        # a chunk may begin within a block
        blocks = max(cdiv(first % how.queries + length, how.queries) for first in starts)
        enqueue(
            rows_kernel,
            (blocks * len(starts), batch * heads, 1),
            (query, key, lse, peak),
            (
                *(strides(x) for x in (query, key)),
                *(starts[0], starts[-1], length, blocks, len(starts), keys, heads, heads // groups),
            ),
            constants_of(dim, scale, how),
            num_warps=how.warps,
            num_stages=how.stages,
        )
        return lse, peak


def column_blocks_of(dim: int, itemsize: int) -> Blocks:
    """As `blocks_of`, with fewer queries at a time: with as many, Blackwell's assembler spills."""
    how = blocks_of(dim, itemsize)
    return how._replace(queries=min(64, how.keys), keys=how.queries)


def compute_columns(query: Tensor, key: Tensor, lse: Tensor, tile: int, chunks: Sequence[int], scale: float) -> Tensor:
    """As `columns`, of the keys of two chunks: where they begin, and their length."""
    with profiled("mass"):
        query, key = last_contiguous(query), last_contiguous(key)
        (count, batch, heads, dim), groups = query.shape, key.shape[2]
        mass, how = _empty_columns(key), column_blocks_of(dim, query.element_size())
        blocks = cdiv(min(tile, count), how.keys)
        enqueue(
            columns_kernel,
            (cdiv(count, tile) * blocks, batch * groups, 1),
            (query, key, lse, mass),
            (*(strides(x) for x in (query, key)), *chunks, count, tile, blocks, heads, heads // groups),
            constants_of(dim, scale, how),
            num_warps=how.warps,
            num_stages=how.stages,
        )
        return mass


def _empty_rows(query: Tensor) -> tuple[Tensor, Tensor]:
    count, batch, heads, _ = query.shape
    lse, peak = (torch.empty((batch, heads, count), dtype=torch.float32, device=query.device) for _ in range(2))
    return lse, peak


def _empty_columns(key: Tensor) -> Tensor:
    return torch.empty((*key.shape[1:3], key.shape[0]), dtype=torch.float32, device=key.device)


rows_op = torch.library.custom_op("lighthouse::mass_rows", compute_rows, mutates_args=())
rows_op.register_fake(lambda query, key, starts, scale: _empty_rows(query))
columns_op = torch.library.custom_op("lighthouse::mass_columns", compute_columns, mutates_args=())
columns_op.register_fake(lambda query, key, lse, tile, chunks, scale: _empty_columns(key))
