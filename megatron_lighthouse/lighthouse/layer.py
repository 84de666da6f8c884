"""One Lighthouse layer. `build` decides once all that the inputs' shapes decide; a call runs the steps in their order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.context_parallel.ring import Passage
from megatron_lighthouse.lighthouse import telemetry
from megatron_lighthouse.lighthouse.around import AROUND
from megatron_lighthouse.lighthouse.config import LighthouseConfig
from megatron_lighthouse.lighthouse.geometry import Geometry, Tiled
from megatron_lighthouse.lighthouse.heads import heads_problem, summed
from megatron_lighthouse.lighthouse.implementations import steps_for
from megatron_lighthouse.lighthouse.rotary import Rotary
from megatron_lighthouse.lighthouse.rows import RowAttention
from megatron_lighthouse.lighthouse.scorers import SCORERS
from megatron_lighthouse.lighthouse.scorers.base import Scorer
from megatron_lighthouse.lighthouse.selection import Selection
from megatron_lighthouse.lighthouse.sharded.deal import Deal
from megatron_lighthouse.lighthouse.sharded.halo import with_halo
from megatron_lighthouse.lighthouse.sharded.select import own_tiles, select_shard
from megatron_lighthouse.lighthouse.steps import HaloTravel, Steps
from megatron_lighthouse.ranges import profiled
from megatron_lighthouse.variant import DEFAULT_PLACE, Place


@dataclass(frozen=True)
class Attended:
    """A layer's state after the inner attention: what the last step, scatter, needs."""

    rows: Tensor
    """[S, B, H, D], the attention's output for the rows whose entries this rank holds."""
    dealt: Tensor
    """The inner attention's own output, of which `rows` is what was dealt back; the same tensor where nothing is dealt."""
    selection: Selection
    steps: Steps
    halo: Tensor | None = None
    """[2, L-1, B, H, D], under context parallelism: the rows that spill into this rank's chunks."""
    travel: HaloTravel | None = None
    """The halo on its way here."""
    passage: Passage | None = None
    """Keys and values on their way, where the inner attention is a ring."""

    def scatter(self) -> Tensor:
        """[N, B, H, D]: the layer's output."""
        output = self.steps.scatter(self.rows, self.selection, self.halo, self.travel)
        if self.passage is not None:
            self.passage.begin_backward_with(output, self.dealt)
        return output


@dataclass(frozen=True)
class Layer:
    """Lighthouse for inputs of one shape."""

    geometry: Geometry
    """Of the whole sequence."""
    own: Tiled
    """Of this rank's tokens, in the tiles of the whole sequence."""
    own_tiles: Geometry | None
    """Of this rank's tiles, where each lies on one rank, so that ranks select alone. None: rows are dealt."""
    pin_first: bool
    causal: bool
    """Whether the selection rests on no later token."""
    steps: Steps
    scorer: Scorer
    exchange: Exchange | None
    gather: Callable[..., tuple[Tensor, ...]]
    """Makes rows of queries, keys, values and streams: `TakesRows.gather` of the attention that `config.around` names."""
    attend: RowAttention | None
    """The inner attention; None where every call brings its own."""
    heads_per_selection: int
    """Key/value heads that share a selection."""
    rotary: Rotary | None
    """Rotates rows on to their window's last token while they are pooled; None: rows are averaged as they come."""
    scale: float | None
    """Of the softmax, by which some scorers attend too; 1/sqrt(D) if None."""

    def attended(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *streams: Tensor,
        attend: Callable[..., Tensor] | None = None,
        selection: Selection | None = None,
        sinks: Tensor | None = None,
    ) -> Attended:
        """All steps but the last, `Attended.scatter`, which must follow: until then the halo is under way.

        Args:
            query, key, value, streams: see `lighthouse_attention`.
            attend: the inner attention of this call, where the layer has none.
            selection: attend to these entries instead of selecting.
            sinks: [H], where the place says that each call brings them.
        """
        deal = None
        if selection is None:
            selection, deal = self.select(query, key, value)
        groups = selection.places.shape[1]
        passage = None if self.attend is None or attend else self.attend.passage()
        # what is gathered for a ring can set out at once, unless it is dealt first
        take = partial(self.steps.gather, selection=selection, travel=None if deal else passage, rotary=self.rotary)
        rows = self.gather(take, selection, query, key, value, *streams)
        rows = deal.out.of_groups(groups, *rows) if deal else rows
        others = () if sinks is None else (sinks,)
        with profiled("attend"):
            if attend:
                attended = attend(*rows, *others)
            else:
                assert self.attend is not None
                attended = self.attend(*rows, *others, passage=passage)
        back = deal.back.of_groups(groups, attended)[0] if deal else attended
        if self.exchange is None:
            return Attended(back, attended, selection, self.steps)
        back, halo, travel = with_halo(back, selection, self.exchange)
        return Attended(back, attended, selection, self.steps, halo, travel, passage)

    def select(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Selection, Deal | None]:
        """The entries of this rank; and, where the ranks hold different numbers of rows, how these are dealt."""
        # no decorator, which torch.compile cannot follow on a method; and not no_grad, which costs the host twice as much
        with torch.set_grad_enabled(False):
            scores = self.scorer(query, key, value, self.own, self.steps, self.exchange, self.rotary, self.scale)
            scores = summed(scores, self.heads_per_selection)
            how, deal = (self.pin_first, self.causal), None
            if self.exchange is None:
                selection = self.steps.select(scores, self.geometry, *how)
            else:
                selection, deal = select_shard(scores, self.geometry, self.own_tiles, *how, self.steps, self.exchange)
            telemetry.record(selection, scores, self.geometry, *how, self.steps, self.scorer.causal)
        return selection, deal


def build(config: LighthouseConfig, query: Tensor, key: Tensor, place: Place = DEFAULT_PLACE) -> Layer:
    """The layer for inputs like these.

    Args:
        query: [N/C, B, H, D]; key: [N/C, B, G, D]; of these only shapes, dtype and device count.
        place: its ranks, its softmax, and what queries and keys are rotated by.

    Raises:
        ValueError: as `lighthouse_attention`.
    """
    base, rotary = AROUND[config.around], place.rotary
    if rotary is not None and (problem := rotary.problem(query.shape[3]) or base.rotary_problem()):
        raise ValueError(problem)
    if problem := heads_problem(config, key.shape[2], query.shape[3], place.value_dim):
        raise ValueError(problem)
    size = place.exchange.size if place.exchange else 1
    geometry = config.geometry(query.shape[0] * size, size)
    attend: RowAttention | None = None
    if not place.base_attends:
        rows_q, rows_k = (x[:1].expand(geometry.gathered_length // size, -1, -1, -1) for x in (query, key))
        attend = base.build_rows(config.inner, rows_q, rows_k, replace(place, past_alone=config.causal_selection))
    return Layer(
        geometry=geometry,
        own=Tiled(query.shape[0], config.levels, config.pooling, geometry.tile),
        own_tiles=own_tiles(geometry, size),
        pin_first=config.pin_first,
        causal=config.causal_selection,
        steps=steps_for(config.steps, query, config.pooling),
        scorer=SCORERS[config.scorer],
        exchange=place.exchange,
        gather=base.gather,
        attend=attend,
        heads_per_selection=config.heads_per_selection or 1,
        rotary=rotary,
        scale=place.scale,
    )
