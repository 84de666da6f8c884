"""Telemetry: what selection did, and how much of it rests on later tokens. Costs nothing until a layer is watched."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_lighthouse import running
from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.lighthouse.geometry import Geometry
from megatron_lighthouse.lighthouse.in_tiles import by_token, first_tokens, in_windows, places_in_tiles
from megatron_lighthouse.lighthouse.packed.packing import Packing
from megatron_lighthouse.lighthouse.packed.steps import PackedSteps
from megatron_lighthouse.lighthouse.selection import Selection
from megatron_lighthouse.lighthouse.steps import Steps

QUANTILES = (10, 50, 90)
"""Of the distances, in per cent."""
CUTS = (25, 50, 75)
"""Where tiles are cut to see what later tokens do, in per cent of a tile."""


@dataclass(frozen=True)
class Choice:
    """A selection, and what it was made from. Of the heads of this rank; under context parallelism, of its tokens, or of the
    whole row of packed documents."""

    selection: Selection
    scores: Tensor
    """[2, B, G, coarse length], as a `Scorer` gives them."""
    geometry: Geometry | Packing
    """Of the whole sequence, or of the row of documents."""
    pin_first: bool
    steps: Steps | PackedSteps
    scores_are_causal: bool = True
    """Whether no score depends on later tokens: `Scorer.causal`."""
    causal: bool = False
    """Whether the selection does not either, as `Steps.select` takes it."""


_layers: running.Watched[Choice] = running.Watched()
watch, watching, watched = _layers.watch, _layers.watching, _layers.found
"""Of each watched layer that ran in this process, its latest choice is kept."""


def record(
    selection: Selection,
    scores: Tensor,
    geometry: Geometry | Packing,
    pin_first: bool,
    causal: bool,
    steps: Steps | PackedSteps,
    scores_are_causal: bool = True,
) -> None:
    """Called by the attention with every selection that it makes, and what it made it from: see `Choice`."""
    if (number := running.current()) in _layers.records:
        _layers.records[number] = Choice(selection, scores, geometry, pin_first, steps, scores_are_causal, causal)


def whole(choice: Choice, sequence: Exchange | None, heads: Exchange | None = None) -> Choice:
    """The choice of the whole sequence and of all heads, from those of the ranks that share them, which all call this.

    Rows are not numbered anew: gathered entries have place 0 where several ranks share the sequence.

    Args:
        sequence: the context-parallel ranks; None where there is one.
        heads: the tensor-parallel ranks, likewise.
    """
    places, scores, geometry = choice.selection.places, choice.scores, choice.geometry
    if heads is not None:
        places, scores = (torch.cat([*heads.all_gather(x, "telemetry")], -2) for x in (places, scores))
    if sequence is not None and not isinstance(geometry, Packing):
        counts = choice.selection.geometry.level_lengths
        places = _in_order((places >= 0).to(torch.int8), counts, sequence).int() - 1
        scores = _in_order(scores, counts[1:], sequence)
    return replace(choice, selection=Selection(geometry, places, geometry.gathered_length), scores=scores)


def _in_order(x: Tensor, counts: list[int], exchange: Exchange) -> Tensor:
    """x [..., entries of this rank], level after level, `counts` in each -> the same for the whole sequence."""
    levels = [exchange.whole(level.movedim(-1, 0), "telemetry") for level in x.split(counts, -1)]
    return torch.cat([level.movedim(0, -1) for level in levels], -1)


def entries_by_level(selection: Selection) -> list[float]:
    """Gathered entries of each level, finest first, averaged over batch elements and heads. The sizes settle them."""
    return [(rows >= 0).sum(-1).double().mean().item() for rows in selection.rows]


def coverage(selection: Selection) -> list[float]:
    """Share of the tokens that lie in a gathered entry of each level, finest first; the coarsest is always 1.

    An entry is gathered only where that of the next level around it is: so it is the share in levels 0..l, too. Of packed
    documents, those tokens that are in no window lie in entries of level 0 alone.
    """
    return [_share(selection, level, rows >= 0) for level, rows in enumerate(selection.rows)]


def coverage_of_any_head(selection: Selection) -> list[float]:
    """`coverage`, a token counting where at least one key/value head gathers the entry. Ours.

    Equal to `coverage` where all heads choose alike, and up to G times as much where each chooses for itself.
    """
    return [_share(selection, level, (rows >= 0).any(1)) for level, rows in enumerate(selection.rows)]


def _share(selection: Selection, level: int, gathered: Tensor) -> float:
    """Of all tokens, those in gathered [..., entries of `level`]."""
    geometry = selection.geometry
    inside = geometry.entries(level) * geometry.window(level) / geometry.seq_length  # 1 but for packed documents
    return gathered.double().mean().item() * inside if inside else 0.0


def distances(choice: Choice) -> list[float]:
    """How far from the last token of their tile the tokens of gathered level-0 entries lie, in tiles: `QUANTILES`. Ours.

    All tiles gather equally many, so how far back they lie in the sequence is settled, and where in its tile is not: 0.1, 0.5
    and 0.9 where they are spread evenly, more where the beginning of tiles is preferred. A document's last tile may be shorter.
    """
    geometry = choice.geometry
    finest = in_windows(geometry, choice.selection.rows[0] >= 0).sum((0, 1)).cpu()
    number, size = (x.cpu() for x in places_in_tiles(geometry, finest.device))
    width = len(finest) // len(number)
    place = (number.unsqueeze(1) * width + torch.arange(width)).flatten()
    tile = size.repeat_interleave(width) * width
    distance = (tile - 1 - place).double() / tile
    distance, order = distance.sort()
    nearer = finest[order].cumsum(0)  # integers, so that no quantile is off by rounding
    return [distance[int((100 * nearer < percent * nearer[-1]).sum())].item() for percent in QUANTILES]


def gap(selection: Selection) -> float:
    """Tokens from a position back to the nearest token of a gathered level-0 entry, itself counting, on average. Ours.

    Where there is none, to before the first token of the sequence or document.
    """
    finest = selection.rows[0] >= 0
    position = torch.arange(finest.shape[-1], device=finest.device)
    before = first_tokens(selection.geometry, finest.device) - 1
    nearest = torch.maximum(position.where(finest, -1).cummax(-1).values, before)
    return (position - nearest).double().mean().item()


def later_tokens(choice: Choice) -> list[float]:
    """How much of the selection rests on later tokens of the same tile, with each tile cut at each of `CUTS`. Ours.

    The selection is made again as if the sequence ended at the cut, in each tile. The answer is the share, of the entries of
    levels 0..L-2 before the cut that either of the two gathers, that only one does. (Level L-1 always is gathered.) Where
    scores do not go by position it is about 1 minus the cut: the budget goes to fewer windows.

    A cut lies between coarsest windows. The scores before it are those that a truncated input would give, where the scorer is
    causal: of another (`mass`) it cannot be told from the scores, and the answer is NaN. After the cut they are 0. No score is
    less, and ties go to the lower entry, so those windows take only what the others leave of the budget.

    The layer alone is asked: its queries, keys and values are as they were, although layers below it select too.
    """
    if not choice.scores_are_causal:
        return [math.nan] * len(CUTS)
    geometry, before = choice.geometry, choice.selection.rows
    number, size = places_in_tiles(geometry, choice.scores.device)
    rule = (choice.pin_first,) if isinstance(geometry, Packing) else (choice.pin_first, choice.causal)
    shares = []
    for percent in CUTS:
        kept = number < torch.minimum((size * percent // 100).clamp(min=1), size - 1)
        coarse = [kept.repeat_interleave(geometry.pooling ** (geometry.levels - 1 - n)) for n in range(1, geometry.levels)]
        masks = [by_token(geometry, coarse[0], 1), *coarse]
        scores = choice.scores.masked_fill(~torch.cat(coarse), 0)
        after = choice.steps.select(scores, geometry, *rule).rows  # type: ignore[arg-type]
        only_one = either = 0
        for a, b, mask in zip(before[:-1], after[:-1], masks[:-1], strict=True):
            a, b = (a >= 0) & mask, (b >= 0) & mask
            only_one, either = only_one + int((a ^ b).sum()), either + int((a | b).sum())
        shares.append(only_one / either if either else math.nan)  # tiles of one window have nothing before a cut
    return shares


def measures(choice: Choice) -> dict[str, float]:
    """All of the above, of the choice of a whole sequence, by the names that `measure_names` gives."""
    selection = choice.selection
    by_level = [*entries_by_level(selection), *coverage(selection), *coverage_of_any_head(selection)]
    values = [*by_level, *distances(choice), gap(selection), *later_tokens(choice)]
    return dict(zip(measure_names(selection.geometry.levels), values, strict=True))


def measure_names(levels: int) -> list[str]:
    """'what/which' of every measure of a layer."""
    return [
        *(f"{what}/level-{level}" for what in ("entries", "coverage", "coverage-any-head") for level in range(levels)),
        *(f"distance/p{percent}" for percent in QUANTILES),
        "gap/mean",
        *(f"later-tokens/cut-{percent}" for percent in CUTS),
    ]
