"""The steps over packed documents in plain PyTorch: any device, any floating dtype, deterministic. What defines them.

A row's windows are pooled, scored and put in causal order as those of one sequence: the row without its loose tokens. See
`Packing` for these, and `megatron_lighthouse.lighthouse.reference` for the steps over one sequence.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megatron_lighthouse.lighthouse import reference as alone
from megatron_lighthouse.lighthouse.packed.maps import Maps
from megatron_lighthouse.lighthouse.packed.packing import Packing
from megatron_lighthouse.lighthouse.packed.steps import Runs, runs_of
from megatron_lighthouse.lighthouse.reference import places_of, pool, read, read_or_zero, tokens_behind
from megatron_lighthouse.lighthouse.rotary import Rotary
from megatron_lighthouse.lighthouse.selection import Selection
from megatron_lighthouse.once import once_differentiable
from megatron_lighthouse.ranges import profiled
from megatron_lighthouse.sequence.documents import Documents
from megatron_lighthouse.sums import accumulation_dtype

__all__ = ["alone", "attended_norms", "gather", "scatter", "score", "select"]


@torch.no_grad()
def score(query: Tensor, key: Tensor, packing: Packing) -> Tensor:
    """See `PackedSteps.score`."""
    inside = Maps.of(packing).inside
    return alone.score(query[inside], key[inside], packing.compact)


@torch.no_grad()
def attended_norms(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    runs: Runs | None = None,
    scale: float | None = None,
) -> Tensor:
    """See `PackedSteps.attended_norms`."""
    kind, starts = accumulation_dtype(query), [0, *accumulate(documents.lengths)]
    norms = torch.zeros((query.shape[1], key.shape[2], len(query)), dtype=kind, device=query.device)
    for i, first, end in runs_of(documents) if runs is None else runs:
        if first < end:
            start, rows = starts[i], slice(starts[i] + first, starts[i] + end)
            k, v = key[start : start + documents.lengths[i]], value[start : start + documents.lengths[i]]
            norms[..., rows] = alone.norms_of_chunks([query[rows]], [first], k, v, scale)
    return norms


@torch.no_grad()
@profiled("select")
def select(scores: Tensor, packing: Packing, pin_first: bool) -> Selection:
    """See `PackedSteps.select`. The tiles of all documents at once: their candidates are ranked together, tile by tile."""
    compact, device = packing.compact, scores.device
    by_level = scores.split(compact.level_lengths[1:], -1)
    _, _, windows, budgets, firsts = packing.tiles.long()
    candidates = torch.ones(*scores.shape[1:3], compact.entries(compact.levels - 1), dtype=torch.bool, device=device)
    gathered = [torch.empty(0)] * compact.levels
    for level in range(compact.levels - 1, -1, -1):
        gathered[level] = candidates
        if level == 0:
            break
        lengths = windows * (compact.window(compact.levels - 1) // compact.window(level))
        by_query, by_key = by_level[level - 1].masked_fill(~candidates, -torch.inf)
        if pin_first:
            by_query[..., (lengths.cumsum(0) - lengths)[firsts.bool()]] = torch.inf
        refined = _highest(by_query, lengths, (budgets + 1) // 2)
        refined |= _highest(by_key.masked_fill(refined, -torch.inf), lengths, budgets // 2)
        candidates = refined.repeat_interleave(compact.pooling, -1)
    return Selection(packing, _places(places_of(gathered, compact), packing), packing.gathered_length)


def _highest(scores: Tensor, lengths: Tensor, counts: Tensor) -> Tensor:
    """Which of the scores [..., n] are the highest of their tile, so many of each; ties go to the lower index."""
    tile = torch.arange(len(lengths), device=scores.device).repeat_interleave(lengths, output_size=scores.shape[-1])
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    order = order.gather(-1, tile[order].sort(dim=-1, stable=True).indices)  # tile by tile, the highest first
    rank = torch.arange(len(tile), device=scores.device) - (lengths.cumsum(0) - lengths)[tile]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, (rank < counts[tile]).expand_as(order))


def _places(compact: Tensor, packing: Packing) -> Tensor:
    """The rows of the windows of one sequence, as rows of the packed row: loose tokens stand between."""
    maps, levels = Maps.of(packing), []
    sizes = packing.compact.level_lengths
    for level, places in enumerate(compact.split(sizes, -1)):
        shift = maps.rows_shift.repeat_interleave(packing.rule.window // packing.window(level))
        levels.append(torch.where(places >= 0, places + shift, -1))
    finest = maps.loose_row.repeat(*compact.shape[:2], 1)
    finest[..., maps.inside] = levels[0]
    return torch.cat([finest, *levels[1:]], -1).int()


@profiled("gather")
def gather(
    query: Tensor, key: Tensor, value: Tensor, selection: Selection, rotary: Rotary | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `PackedSteps.gather`."""
    grouped = query.unflatten(2, (key.shape[2], -1))
    rows_k, rows_v = _Gather.apply(key, selection, rotary), _Gather.apply(value, selection, None)
    return _Gather.apply(grouped, selection, rotary).flatten(2, 3), rows_k, rows_v


@profiled("scatter")
def scatter(rows: Tensor, selection: Selection) -> Tensor:
    """See `PackedSteps.scatter`."""
    return _Scatter.apply(rows.unflatten(2, (selection.places.shape[1], -1)), selection).flatten(2, 3)


def _of(selection: Selection) -> tuple[Packing, Maps]:
    packing = selection.geometry
    assert isinstance(packing, Packing)
    return packing, Maps.of(packing)


class _Gather(torch.autograd.Function):
    """dX_j = sum over levels of dX̃[row(l, j // p^l)] / p^l, turned back by as much as X_j was turned on."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, selection: Selection, rotary: Rotary | None) -> Tensor:
        ctx.selection, ctx.rotary = selection, rotary  # type: ignore[attr-defined]
        packing, maps = _of(selection)
        return read(torch.cat([x, *pool(x[maps.inside], packing.compact, rotary)[1:]]), selection.indices)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        selection: Selection = ctx.selection  # type: ignore[attr-defined]
        rotary: Rotary | None = ctx.rotary  # type: ignore[attr-defined]
        packing, maps = _of(selection)
        tokens, *coarse = (read_or_zero(grad, rows) / packing.window(level) for level, rows in enumerate(selection.rows))
        total = torch.zeros_like(coarse[-1])
        for level in range(packing.levels - 1, 0, -1):
            parts = (total + coarse[level - 1]).unsqueeze(1).expand(-1, packing.pooling, *total.shape[1:])
            total = (parts if rotary is None else rotary.turn(parts, -tokens_behind(packing, level))).flatten(0, 1)
        tokens[maps.inside] += total
        return tokens.to(grad.dtype), None, None


class _Scatter(torch.autograd.Function):
    """dÕ_m = sum of dO over the positions that entry m spills to."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, selection: Selection) -> Tensor:
        ctx.selection = selection  # type: ignore[attr-defined]
        _, maps = _of(selection)
        tokens, *coarse = selection.rows
        out = read_or_zero(rows, tokens)
        for level, places in enumerate(coarse, start=1):
            if not places.shape[-1]:  # the pieces of a rank may hold no window
                continue
            entry = maps.received(level)
            out += read_or_zero(rows, places[..., entry.clamp(min=0)].where(entry >= 0, -1))
        return out.to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        selection: Selection = ctx.selection  # type: ignore[attr-defined]
        packing, maps = _of(selection)
        wide = grad.to(accumulation_dtype(grad))
        ended = torch.cat([wide, wide.new_zeros(1, *wide.shape[1:])])
        sums = [wide, *(ended[maps.spilled(level)].sum(1) for level in range(1, packing.levels))]
        return read(torch.cat(sums), selection.indices).to(grad.dtype), None
