"""Select over packed documents: as `kernels.lighthouse.select`, with the tiles of all documents in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lighthouse.kernels.launch import cdiv, enqueue
from megatron_lighthouse.kernels.lighthouse.select import (
    BLOCK,
    HIGHEST,
    REJECTED,
    gathered_before,
    key_of,
    limit_on,
    refine,
    warps_of,
)
from megatron_lighthouse.kernels.lighthouse.windows import documents_of, level_offset
from megatron_lighthouse.lighthouse.packed.packing import Packing
from megatron_lighthouse.lighthouse.packed.rule import Rule
from megatron_lighthouse.ranges import profiled
from megatron_lighthouse.sums import next_power_of_two

COUNTS = ["documents", "units", "compact_length", "coarse_length", "tokens", "budget"]
"""Numbers that change from row to row."""


@triton.jit(repr=lambda _: "lighthouse_packed_select_refine", do_not_specialize=["tiles", "compact_length", "coarse_length"])
def packed_refine_kernel(
    p_scores,
    p_ranks,
    p_tiles,
    tiles,
    compact_length,
    coarse_length,
    P: tl.constexpr,
    L: tl.constexpr,
    PIN_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE: tl.constexpr,
):
    """As `refine_kernel`, of the windows of all documents as one sequence; program (tile, g). `p_tiles`: `Packing.tiles`."""
    p_rank = p_ranks + tl.program_id(1).to(tl.int64) * coarse_length
    p_score_q = p_scores + tl.program_id(1).to(tl.int64) * coarse_length
    p_score_k = p_score_q + tl.num_programs(1).to(tl.int64) * coarse_length
    p_tile = p_tiles + tl.program_id(0)
    windows_before, before, windows = tl.load(p_tile), tl.load(p_tile + tiles), tl.load(p_tile + 2 * tiles)
    budget, is_first = tl.load(p_tile + 3 * tiles), tl.load(p_tile + 4 * tiles)
    p_parents = p_rank
    for level in tl.static_range(L - 1, 0, -1):
        length = windows * P ** (L - 1 - level)
        first = level_offset(compact_length, level, P) - compact_length + windows_before * P ** (L - 1 - level)
        p_keys = p_rank + first
        for start in range(0, length, BLOCK):
            i = start + tl.arange(0, BLOCK)
            candidate = i < length
            if level < L - 1:
                candidate &= tl.load(p_parents + i // P, mask=candidate, other=0) % 2 == 1
            key = tl.where(candidate, key_of(p_score_q + first, i, candidate), REJECTED)
            if PIN_FIRST:
                key = tl.where((is_first == 1) & (i == 0), HIGHEST, key)
            tl.store(p_keys + i, key, mask=i < length)
        tl.debug_barrier()
        refine(p_keys, p_score_k + first, length, (budget + 1) // 2, budget // 2, before, BLOCK, ONE)
        p_parents = p_keys


@triton.jit(repr=lambda _: "lighthouse_packed_select_place", do_not_specialize=COUNTS)
def packed_place_kernel(
    p_ranks,
    p_places,
    p_documents,
    documents,
    units,
    compact_length,
    coarse_length,
    tokens,
    budget,
    P: tl.constexpr,
    L: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The row of each entry, or -1; program (block of entries of each level, g).

    A window's row is that which it has in one sequence of the windows of all documents, and the loose tokens of the documents
    before. A loose token stands as far before the end of its document's rows as before that of its tokens.
    """
    p_rank = p_ranks + tl.program_id(1).to(tl.int64) * coarse_length
    p_place = p_places + tl.program_id(1).to(tl.int64) * (tokens + coarse_length)
    for level in tl.static_range(L):
        if tl.program_id(0) * BLOCK < units * P ** (L - 1 - level):
            i_part = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
            i_in, start, length, before, windows = documents_of(i_part, p_documents, documents, units, P ** (L - 1 - level))
            i_entry = before * P ** (L - 1 - level) + i_in
            mask = i_in < windows * P ** (L - 1 - level)
            gathered = mask
            if level < L - 1:
                offset = level_offset(compact_length, level + 1, P) - compact_length
                gathered &= tl.load(p_rank + offset + i_entry // P, mask=mask, other=0) % 2 == 1
            place = tl.zeros([BLOCK], tl.int32)
            for other in tl.static_range(L):
                end = (i_entry + 1) * P ** (level - other) if other < level else i_entry // P ** (other - level)
                place += gathered_before(p_rank, end, mask, compact_length, budget, other, P, L)
            place = tl.where(gathered, place + start - before * P ** (L - 1), -1)
            if level == 0:
                rows_end = tl.load(p_documents + 3 * documents + i_part // P ** (L - 1), mask=i_in < length, other=0)
                rows_end = tl.load(p_documents + 2 * documents + rows_end + 1)
                place = tl.where(mask, place, rows_end - length + i_in)
                tl.store(p_place + start + i_in, place, mask=i_in < length)
            else:
                tl.store(p_place + i_entry, place, mask=mask)
        if level == 0:
            p_place += tokens
        else:
            p_place += compact_length // P**level


def compute_packed_places(scores: Tensor, packing: Packing, pin_first: bool) -> Tensor:
    """`Selection.places` [1, G, pyramid length], from scores [2, 1, G, coarse length], contiguous."""
    with profiled("select"):
        groups, compact = scores.shape[2], packing.compact
        ranks = torch.empty(scores.shape[1:], dtype=torch.int32, device=scores.device)
        places = torch.empty((1, groups, packing.pyramid_length), dtype=torch.int32, device=scores.device)
        tiles, shape = packing.tiles, {"P": packing.pooling, "L": packing.levels}
        block, one = packed_block_of(packing.rule)
        enqueue(
            packed_refine_kernel,
            (tiles.shape[1], groups, 1),
            (scores, ranks, tiles),
            (tiles.shape[1], compact.seq_length, packing.coarse_length),
            {**shape, "PIN_FIRST": pin_first, "BLOCK": block, "ONE": one},
            num_warps=warps_of(block),
            **limit_on(scores.device),
        )
        counts = (packing.bounds.shape[1], packing.units, compact.seq_length, packing.coarse_length, packing.seq_length)
        enqueue(
            packed_place_kernel,
            (cdiv(packing.units * packing.rule.window, 256), groups, 1),
            (ranks, places, packing.unit_table),
            (*counts, packing.budget),
            {**shape, "BLOCK": 256},
            num_warps=4,
        )
        return places


def packed_block_of(rule: Rule) -> tuple[int, bool]:
    """Scores that a program holds at a time, and whether that is all of a tile's level 1, the longest."""
    longest = rule.tile_windows * rule.pooling ** (rule.levels - 2)
    block = min(BLOCK, next_power_of_two(longest))
    return block, longest <= block
