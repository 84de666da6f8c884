"""Select: which windows are refined, tile by tile and coarse to fine, and the row that each gathered entry gets.

No sort and no atomics: the m/2-th highest score of a tile is found by bisection over the bits of the scores, which order
non-negative floats as integers; ties and rows are prefix sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lighthouse.gpu import capability_of
from megatron_lighthouse.kernels.launch import RELEASE, Prepared, cdiv
from megatron_lighthouse.kernels.lighthouse.windows import level_offset
from megatron_lighthouse.lighthouse.geometry import Geometry
from megatron_lighthouse.ranges import profiled
from megatron_lighthouse.sums import next_power_of_two

BLOCK = 2048
"""Scores that a program holds at most at a time; a longer tile is read in parts."""
REGISTERS = 128
"""What a thread may use on Hopper: left alone, the assembler of older releases allows itself less and spills."""
CHOSEN = tl.constexpr(-2)
REJECTED = tl.constexpr(-1)
HIGHEST = tl.constexpr(0x7FFFFFFF)
FIELD = tl.constexpr(0x1FFFFF)


@triton.jit
def _at_least(keys, t1, t2, t3):
    """Which of three thresholds each key reaches, as counters of 21 bits each."""
    one, two, three = (keys >= t1).to(tl.int64), (keys >= t2).to(tl.int64), (keys >= t3).to(tl.int64)
    return one + (two << 21) + (three << 42)


@triton.jit
def _count(p_keys, length, keys, t1, t2, t3, BLOCK: tl.constexpr, ONE: tl.constexpr):
    """How many keys reach each of three thresholds: of `keys` where one block holds all, else of memory."""
    if ONE:
        total = tl.sum(_at_least(keys, t1, t2, t3))
        return total & FIELD, (total >> 21) & FIELD, total >> 42
    counts = tl.zeros([BLOCK], tl.int64)
    for start in range(0, length, BLOCK):
        i = start + tl.arange(0, BLOCK)
        counts += _at_least(tl.load(p_keys + i, mask=i < length, other=REJECTED), t1, t2, t3)
    # apart, for the count of a long tile may need more bits than a field has
    return tl.sum(counts & FIELD), tl.sum((counts >> 21) & FIELD), tl.sum(counts >> 42)


@triton.jit
def _threshold(p_keys, length, WANTED, BLOCK: tl.constexpr, ONE: tl.constexpr):
    """The WANTED-th highest key, and how many of those equal to it are among the WANTED highest."""
    i = tl.arange(0, BLOCK)
    keys = tl.load(p_keys + i, mask=i < length, other=REJECTED)
    threshold = 0
    for i_pair in range(16):
        # two of the 31 bits at a time, from the top; the last pair decides one of them again, alike
        shift = tl.maximum(29 - 2 * i_pair, 0)
        t1, t2, t3 = threshold | (1 << shift), threshold | (2 << shift), threshold | (3 << shift)
        n1, n2, n3 = _count(p_keys, length, keys, t1, t2, t3, BLOCK, ONE)
        threshold = tl.where(n3 >= WANTED, t3, tl.where(n2 >= WANTED, t2, tl.where(n1 >= WANTED, t1, threshold)))
    above = 0
    if threshold < HIGHEST:
        higher = threshold + 1
        above = _count(p_keys, length, keys, higher, higher, higher, BLOCK, ONE)[0].to(tl.int32)
    return threshold, WANTED - above


@triton.jit
def _among(keys, threshold, equals_left, equals_seen):
    """Which keys are among the highest, ties to the lower index; and the equal ones seen up to the end of this block."""
    equal = (keys == threshold).to(tl.int32)
    seen = equals_seen + tl.cumsum(equal)
    among = (keys > threshold) | ((equal == 1) & (seen <= equals_left))
    return among, equals_seen + tl.sum(equal)


@triton.jit
def key_of(p_score, i, mask):
    # without the sign, which only a NaN can have: a key must not be negative
    return tl.load(p_score + i, mask=mask, other=0.0).to(tl.int32, bitcast=True) & HIGHEST


@triton.jit
def refine(p_keys, p_score_k, length, by_query, by_key, before, BLOCK: tl.constexpr, ONE: tl.constexpr):
    """Turn the keys of one level of a tile into ranks, from `before` on: so many refined by s^Q, and of the rest by s^K."""
    threshold, left = _threshold(p_keys, length, by_query, BLOCK, ONE)
    tl.debug_barrier()
    seen = 0
    for start in range(0, length, BLOCK):
        i = start + tl.arange(0, BLOCK)
        key = tl.load(p_keys + i, mask=i < length, other=REJECTED)
        chosen, seen = _among(key, threshold, left, seen)
        other = key_of(p_score_k, i, (key >= 0) & ~chosen)
        tl.store(p_keys + i, tl.where(chosen, CHOSEN, tl.where(key >= 0, other, REJECTED)), mask=i < length)
    tl.debug_barrier()
    threshold, left = _threshold(p_keys, length, by_key, BLOCK, ONE)
    tl.debug_barrier()
    seen = 0
    for start in range(0, length, BLOCK):
        i = start + tl.arange(0, BLOCK)
        key = tl.load(p_keys + i, mask=i < length, other=REJECTED)
        chosen, seen = _among(key, threshold, left, seen)
        refined = (chosen | (key == CHOSEN)).to(tl.int32)
        rank = before + tl.cumsum(refined) - refined
        before += tl.sum(refined)
        tl.store(p_keys + i, 2 * rank + refined, mask=i < length)
    tl.debug_barrier()


@triton.jit(repr=lambda _: "lighthouse_select_refine")
def refine_kernel(
    p_scores,
    p_ranks,
    seq_length,
    coarse_length,
    TILES,
    P: tl.constexpr,
    L: tl.constexpr,
    TILE_BUDGET: tl.constexpr,
    PIN_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE: tl.constexpr,
):
    """Refine TILE_BUDGET entries at each of the levels L-1..1 of one tile; program (tile, b * G + g).

    Writes, for every entry of those levels, 2 * (refined entries of its level before it) + (1 if it is refined).
    Until a level is decided, its ranks hold the keys of its candidates.
    """
    p_rank = p_ranks + tl.program_id(1).to(tl.int64) * coarse_length
    p_score_q = p_scores + tl.program_id(1).to(tl.int64) * coarse_length
    p_score_k = p_score_q + tl.num_programs(1).to(tl.int64) * coarse_length
    p_parents = p_rank
    for level in tl.static_range(L - 1, 0, -1):
        length = seq_length // P**level // TILES
        first = level_offset(seq_length, level, P) - seq_length + tl.program_id(0) * length
        p_keys = p_rank + first
        for start in range(0, length, BLOCK):
            i = start + tl.arange(0, BLOCK)
            candidate = i < length
            if level < L - 1:
                candidate &= tl.load(p_parents + i // P, mask=candidate, other=0) % 2 == 1
            key = tl.where(candidate, key_of(p_score_q + first, i, candidate), REJECTED)
            if PIN_FIRST:
                key = tl.where((tl.program_id(0) == 0) & (i == 0), HIGHEST, key)
            tl.store(p_keys + i, key, mask=i < length)
        tl.debug_barrier()
        before = tl.program_id(0) * TILE_BUDGET
        refine(p_keys, p_score_k + first, length, TILE_BUDGET // 2, TILE_BUDGET // 2, before, BLOCK, ONE)
        p_parents = p_keys


@triton.jit
def gathered_before(p_rank, i_entry, mask, seq_length, budget, LEVEL: tl.constexpr, P: tl.constexpr, L: tl.constexpr):
    """How many entries of LEVEL before `i_entry` are gathered: the children of refined parents."""
    if LEVEL == L - 1:
        return i_entry
    i_parent = i_entry // P
    m_parent = i_parent < seq_length // P ** (LEVEL + 1)
    offset = level_offset(seq_length, LEVEL + 1, P) - seq_length
    rank = tl.load(p_rank + offset + i_parent, mask=mask & m_parent, other=0)
    rank = tl.where(m_parent, rank, 2 * budget)
    return rank // 2 * P + rank % 2 * (i_entry % P)


@triton.jit(repr=lambda _: "lighthouse_select_place")
def place_kernel(
    p_ranks,
    p_places,
    seq_length,
    coarse_length,
    pyramid_length,
    budget,
    P: tl.constexpr,
    L: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The row of each entry in causal order, or -1; program (block of entries of each level, b * G + g).

    The order sorts by (last token, level): before entry (l, i) stand the finer entries up to its last token, and those
    of its own and coarser levels that end before it.
    """
    p_rank = p_ranks + tl.program_id(1).to(tl.int64) * coarse_length
    p_place = p_places + tl.program_id(1).to(tl.int64) * pyramid_length
    for level in tl.static_range(L):
        length = seq_length // P**level
        if tl.program_id(0) * BLOCK < length:
            i_entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
            mask = i_entry < length
            gathered = mask
            if level < L - 1:
                offset = level_offset(seq_length, level + 1, P) - seq_length
                gathered = tl.load(p_rank + offset + i_entry // P, mask=mask, other=0) % 2 == 1
            place = tl.zeros([BLOCK], tl.int32)
            for other in tl.static_range(L):
                end = (i_entry + 1) * P ** (level - other) if other < level else i_entry // P ** (other - level)
                place += gathered_before(p_rank, end, mask, seq_length, budget, other, P, L)
            tl.store(p_place + i_entry, tl.where(gathered, place, -1), mask=mask)
        p_place += length


def compute_places(scores: Tensor, sizes: Sequence[int], pin_first: bool) -> Tensor:
    """`Selection.places` from scores [2, B, G, coarse length], contiguous; `sizes` is (N, L, p, k, m)."""
    with profiled("select"):
        _, batch, groups, coarse_length = scores.shape
        pyramid_length, refine, place = _settled(tuple(sizes), batch * groups, pin_first, scores.device)
        places = scores.new_empty(batch, groups, pyramid_length, dtype=torch.int32)
        ranks = scores.new_empty(batch, groups, coarse_length, dtype=torch.int32)
        refine(scores, ranks)
        place(ranks, places)
        return places


@lru_cache(1024)
def _settled(sizes: tuple[int, ...], rows: int, pin_first: bool, device: torch.device) -> tuple[int, Prepared, Prepared]:
    """What sizes settle: the length of the pyramid, and both launches."""
    geometry = Geometry(*sizes)
    block, one = block_of(geometry)
    counts = geometry.seq_length, geometry.coarse_length, geometry.tiles
    constants = {"P": geometry.pooling, "L": geometry.levels, "TILE_BUDGET": geometry.tile_budget}
    constants |= {"PIN_FIRST": pin_first, "BLOCK": block, "ONE": one}
    options = {"num_warps": warps_of(block), **limit_on(device)}
    refine = Prepared(refine_kernel, (geometry.tiles, rows, 1), counts, constants, **options)
    return geometry.pyramid_length, refine, place_launch(geometry, rows)


def place_launch(geometry: Geometry, rows: int) -> Prepared:
    """Of the ranks that `refine_kernel` writes, [B, G, coarse length], and `Selection.places`; there are B * G rows."""
    counts = geometry.seq_length, geometry.coarse_length, geometry.pyramid_length, geometry.budget
    constants = {"P": geometry.pooling, "L": geometry.levels, "BLOCK": 256}
    return Prepared(place_kernel, (cdiv(geometry.seq_length, 256), rows, 1), counts, constants, num_warps=4)


@cache
def block_of(geometry: Geometry) -> tuple[int, bool]:
    """Scores that a program holds at a time, and whether that is all of a tile's level 1, the longest."""
    longest = geometry.entries(1) // geometry.tiles
    block = min(BLOCK, next_power_of_two(longest))
    return block, longest <= block


def warps_of(block: int) -> int:
    """Four scores a thread, so that none are spilled."""
    return max(1, block // 128)


def limit_of(capability: int) -> dict[str, int]:
    """The option of `refine_kernel`'s compiler: Blackwell's assembler spills under a limit, by Triton 3.9 Hopper's too, and
    neither does without one."""
    return {"maxnreg": REGISTERS} if capability < 100 and RELEASE < (3, 9) else {}


@cache
def limit_on(device: torch.device) -> dict[str, int]:
    """The same of a device."""
    return limit_of(capability_of(device))


def _empty(scores: Tensor, geometry: Geometry) -> Tensor:
    _, batch, groups, _ = scores.shape
    return scores.new_empty(batch, groups, geometry.pyramid_length, dtype=torch.int32)


select_op = torch.library.custom_op("lighthouse::select", compute_places, mutates_args=())
select_op.register_fake(lambda scores, sizes, pin_first: _empty(scores, Geometry(*sizes)))
