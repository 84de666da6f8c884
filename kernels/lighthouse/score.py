"""Score: the norms of all queries and keys, and their maxima over windows; reads Q and K once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lighthouse.kernels.launch import Prepared, cdiv, enqueue, laid_out, launch, padded
from megatron_lighthouse.lighthouse.geometry import Pyramid
from megatron_lighthouse.ranges import profiled
from megatron_lighthouse.sums import next_power_of_two


@triton.jit
def norms_of(p_x, stride_token, stride_head, i_token, m_token, R, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    """The norms of R rows of D taken as one vector, [BLOCK]. Neighbours are added first, then neighbours of those, and so
    on: an order that does not hang on how the compiler lays a block out, so that every machine ranks alike."""
    i_d = tl.arange(0, BLOCK_D)
    p_row = p_x + i_token.to(tl.int64)[:, None] * stride_token + i_d[None, :]
    mask = m_token[:, None] & (i_d < D)[None, :]
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(R):
        x = tl.load(p_row, mask=mask, other=0.0).to(tl.float32)
        x = x * x
        width: tl.constexpr = BLOCK_D
        for halving in tl.static_range(16):
            if width >> halving > 1:
                left, right = tl.split(tl.reshape(x, [BLOCK, width >> (halving + 1), 2]))
                x = left + right
        total += tl.reshape(x, [BLOCK])
        p_row += stride_head
    return tl.sqrt_rn(total)


@triton.jit
def entry_of(i_slot, DIGITS: tl.constexpr, P: tl.constexpr, P2: tl.constexpr):
    """The entry of a slot, and whether it has one. Blocks are powers of two and p need not be: a slot is a number whose
    last DIGITS digits count to P2, the power of two from p on; those that exceed p - 1 are empty."""
    i_entry, valid = i_slot * 0, i_slot >= 0
    for digit in tl.static_range(DIGITS):
        i_entry += i_slot % P2 * P**digit
        valid &= i_slot % P2 < P
        i_slot //= P2
    return i_entry + i_slot * P**DIGITS, valid


@triton.jit
def window_maxima(
    p_level, best, length, P: tl.constexpr, P2: tl.constexpr, L: tl.constexpr, FUSED: tl.constexpr, BLOCK: tl.constexpr
):
    """Store the maxima of a block of scores, of `length` tokens in all, over the windows of levels 1..FUSED."""
    for l in tl.static_range(1, FUSED + 1):
        best = tl.max(tl.reshape(best, [BLOCK // P2**l, P2]), 1)
        i_slot = tl.program_id(0) * (BLOCK // P2**l) + tl.arange(0, BLOCK // P2**l)
        i_entry, valid = entry_of(i_slot, L - 1 - l, P, P2)
        tl.store(p_level + i_entry, best, mask=valid & (i_entry < length // P**l))
        p_level += length // P**l


@triton.jit(repr=lambda _: "lighthouse_score")
def score_kernel(
    p_q,
    p_k,
    p_scores,
    strides_q,
    strides_k,
    seq_length,
    coarse_length,
    G,
    R,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    P: tl.constexpr,
    P2: tl.constexpr,
    L: tl.constexpr,
    FUSED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Scores [2, B, G, coarse length] of levels 1..FUSED; program (tokens, b * G + g, 0 for Q and 1 for K)."""
    i_bg = tl.program_id(1)
    i_b, i_g = (i_bg // G).to(tl.int64), (i_bg % G).to(tl.int64)
    i_token, m_token = entry_of(tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), L - 1, P, P2)
    m_token &= i_token < seq_length
    if tl.program_id(2) == 0:
        p_x = p_q + i_b * strides_q[1] + i_g * R * strides_q[2]
        best = norms_of(p_x, strides_q[0], strides_q[2], i_token, m_token, R, D, BLOCK_D, BLOCK)
    else:
        p_x = p_k + i_b * strides_k[1] + i_g * strides_k[2]
        best = norms_of(p_x, strides_k[0], 0, i_token, m_token, 1, D, BLOCK_D, BLOCK)
    p_level = p_scores + (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + i_bg) * coarse_length
    window_maxima(p_level, tl.where(m_token, best, -1.0), seq_length, P, P2, L, FUSED, BLOCK)


@triton.jit(repr=lambda _: "lighthouse_score_coarsen")
def coarsen_kernel(p_finer, p_coarser, stride, length, P: tl.constexpr, BLOCK: tl.constexpr):
    """coarser[i] = the maximum of finer[p*i..p*i + p - 1]; for windows that do not fit in a block of tokens."""
    p_row = tl.program_id(1).to(tl.int64) * stride
    i_entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    best = tl.full([BLOCK], -1.0, tl.float32)
    for c in range(P):
        best = tl.maximum(best, tl.load(p_finer + p_row + i_entry * P + c, mask=i_entry < length, other=-1.0))
    tl.store(p_coarser + p_row + i_entry, best, mask=i_entry < length)


def compute_scores(query: Tensor, key: Tensor, sizes: Sequence[int]) -> Tensor:
    """See `Steps.score`; `sizes` is (N, L, p)."""
    with profiled("score"):
        (query, key), strides = laid_out((query, key))
        shape, norms, geometry, fused = _settled(query.shape, key.shape[2], strides, query.dtype, tuple(sizes))
        scores = key.new_empty(*shape, dtype=torch.float32)
        norms(query, key, scores)
        if fused < geometry.levels - 1:
            coarsen(scores, geometry, fused)
        return scores


@lru_cache(1024)
def _settled(
    shape: torch.Size, groups: int, strides: tuple[tuple[int, ...], ...], dtype: torch.dtype, sizes: tuple[int, int, int]
) -> tuple[tuple[int, int, int, int], Prepared, Pyramid, int]:
    """What shapes settle: that of the scores, the launch, and the pyramid, of which it scores so many levels."""
    (_, batch, heads, dim), geometry, how = shape, Pyramid(*sizes), launch("score", shape[3], dtype.itemsize)
    block, digit, fused = blocks_of(geometry, how.rows)
    slots = geometry.entries(geometry.levels - 1) * digit ** (geometry.levels - 1)
    grid, counts = (
        (cdiv(slots, block), batch * groups, 2),
        (geometry.seq_length, geometry.coarse_length, groups, heads // groups),
    )
    constants = {"D": dim, "BLOCK_D": padded(dim), "P": geometry.pooling, "P2": digit, "L": geometry.levels}
    constants |= {"FUSED": fused, "BLOCK": block}
    # a fused multiply-add would round fp32 squares otherwise than the reference
    options = {"num_warps": how.warps, "enable_fp_fusion": False}
    norms = Prepared(score_kernel, grid, (*strides, *counts), constants, **options)
    return (2, batch, groups, geometry.coarse_length), norms, geometry, fused


def coarsen(scores: Tensor, geometry: Pyramid, fused: int) -> None:
    """The levels above `fused`, each from the one below."""
    levels = scores.split(geometry.level_lengths[1:], -1)
    for level in range(fused + 1, geometry.levels):
        length, grid = geometry.entries(level), (2 * scores.shape[1] * scores.shape[2], 1)
        numbers, constants = (geometry.coarse_length, length), {"P": geometry.pooling, "BLOCK": 256}
        enqueue(coarsen_kernel, (cdiv(length, 256), *grid), (levels[level - 2], levels[level - 1]), numbers, constants)


@cache
def blocks_of(geometry: Pyramid, rows: int) -> tuple[int, int, int]:
    """Tokens a program scores, the power of two from p on, and how many levels of windows fit in those tokens."""
    digit = next_power_of_two(geometry.pooling)
    block = max(rows, digit)
    return block, digit, max(level for level in range(1, geometry.levels) if digit**level <= block)


def _empty(key: Tensor, geometry: Pyramid) -> Tensor:
    return key.new_empty(2, *key.shape[1:3], geometry.coarse_length, dtype=torch.float32)


score_op = torch.library.custom_op("lighthouse::score", compute_scores, mutates_args=())
score_op.register_fake(lambda query, key, sizes: _empty(key, Pyramid(*sizes)))
