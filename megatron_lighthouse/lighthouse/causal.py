"""A causal selection (ours): the output at a position depends on no later token, not even through which windows are refined.

As in the paper, m windows of a tile are refined at each level: half of them chosen by queries, half of the rest by keys. What
differs is when each choice is made, and from what:

1. By queries a window is refined for the tokens in it. So this is decided before its first token, by s^Q of the window before
   it. Its children are used as in the paper.
2. By keys a window is refined for the tokens after it. So this is decided at its last token, by its own s^K. Its children, and
   all that these are refined into, are gathered as in the paper, but as keys alone until the window has ended: the output of a
   row that ends earlier would come too early, so that row is silent (not scattered).

Either choice goes window by window. A window is refined if, of the windows of its tile so far, those that score as high are
fewer than the tile's share. When the share is spent none are refined any more; when as many windows are left as are still
wanted, all are. So S is the paper's.

The order of rows is the paper's too: inside a window that keys refined, no query sees anything before the window's last token,
and the rows of its children stand just before its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_lighthouse.lighthouse.geometry import Geometry
from megatron_lighthouse.lighthouse.selection import Selection

ROWS = 256
"""Windows that `earlier_as_high` ranks at a time."""


def select_causally(
    scores: Tensor,
    geometry: Geometry,
    places_of: Callable[[list[Tensor], Geometry], Tensor],
    ranks: Callable[[Tensor], Tensor],
) -> Selection:
    """See `Steps.select`; without gradients.

    Args:
        scores: [2, B, G, coarse length], of a scorer that is causal.
        places_of: the places of entries, as `reference.places_of` gives them, from which are gathered, a mask a level.
        ranks: what `earlier_as_high` computes.
    """
    half, pooling, top = geometry.tile_budget // 2, geometry.pooling, geometry.levels - 1
    scores = scores.nan_to_num(nan=torch.inf, posinf=torch.inf)  # a NaN is the highest
    by_level = scores.split(geometry.level_lengths[1:], -1)
    shape = (*scores.shape[1:3], geometry.tiles, geometry.tile)
    candidates = torch.arange(geometry.entries(top), device=scores.device).view(shape[2:]).expand(shape)
    # live: in no window that keys refined; heard: the row is scattered, not silent
    live = heard = torch.ones(shape, dtype=torch.bool, device=scores.device)
    gathered, audible = [torch.empty(0)] * geometry.levels, [torch.empty(0)] * geometry.levels
    of_queries, child = geometry.tile, torch.arange(pooling, device=scores.device)
    for level in range(top, -1, -1):
        nothing = live.new_zeros(*shape[:2], geometry.entries(level))
        gathered[level] = nothing.scatter(-1, candidates.flatten(2), True)
        audible[level] = nothing.scatter(-1, candidates.flatten(2), heard.flatten(2))
        if level == 0:
            break
        by_query, by_key = by_level[level - 1]
        first = chosen(_take(_before(by_query, geometry.tiles), candidates), live, half, of_queries, ranks)
        of_keys = candidates.shape[-1] - half
        refined = first | chosen(_take(by_key, candidates), ~first, half, of_keys, ranks)
        index = _numbers(refined, geometry.tile_budget)
        candidates, heard, live = (x.gather(-1, index).unsqueeze(-1) for x in (candidates, heard, first))
        candidates = (candidates * pooling + child).flatten(-2)
        heard = (live | heard & (child == pooling - 1)).flatten(-2)
        live, of_queries = live.expand(*live.shape[:-1], pooling).flatten(-2), half * pooling
    places = places_of(gathered, geometry)
    return Selection(geometry, places, geometry.gathered_length, spills=places.where(torch.cat(audible, -1), -1))


def chosen(scores: Tensor, eligible: Tensor, wanted: int, count: int, ranks: Callable[[Tensor], Tensor]) -> Tensor:
    """Which of some windows in order are refined, each decided by the scores up to its own (ours).

    One is above the others so far if, of those up to it, fewer than their share `wanted` / `count` score as high. All of these
    are refined, until there are `wanted`; and the last ones, from where else there would be fewer.

    Args:
        scores: [..., n], none below 0.
        eligible: [..., n] bool, `count` of them true.
        ranks: what `earlier_as_high` computes.

    Returns:
        [..., n] bool, `wanted` of them true.
    """
    seen = eligible.cumsum(-1)
    rank = ranks(scores.where(eligible, -1))
    above = eligible & (rank * count < wanted * seen)
    taken = torch.maximum(above.cumsum(-1).clamp(max=wanted), wanted - count + seen)
    return taken.diff(dim=-1, prepend=torch.zeros_like(taken[..., :1])) > 0


def earlier_as_high(scores: Tensor) -> Tensor:
    """Of scores [..., n], how many before each are at least as high: [..., n] int64."""
    counts, number = [], torch.arange(scores.shape[-1], device=scores.device)
    for start in range(0, scores.shape[-1], ROWS):
        part = scores[..., start : start + ROWS, None]
        end = start + part.shape[-2]
        as_high = scores[..., None, :end] >= part
        counts.append((as_high & (number[:end] < number[start:end, None])).sum(-1))
    return torch.cat(counts, -1)


def _before(scores: Tensor, tiles: int) -> Tensor:
    """The scores of the windows before, in each tile; none is before its first."""
    return torch.nn.functional.pad(scores.unflatten(-1, (tiles, -1))[..., :-1], (1, 0)).flatten(-2)


def _take(scores: Tensor, candidates: Tensor) -> Tensor:
    return scores.gather(-1, candidates.flatten(2)).view(candidates.shape)


def _numbers(mask: Tensor, count: int) -> Tensor:
    """The numbers, in their order, of the `count` that are true in each row of a mask [..., n]: [..., count]."""
    # those that are not true are written to one slot behind the end, which is cut off
    slot = (mask.cumsum(-1) - 1).where(mask, count)
    number = torch.arange(mask.shape[-1], device=mask.device).expand_as(slot)
    return slot.new_zeros(*slot.shape[:-1], count + 1).scatter(-1, slot, number)[..., :count]
