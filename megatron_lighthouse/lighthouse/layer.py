"""A layer: everything about Lighthouse that its inputs' shapes decide, decided once; its calls only compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

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


@dataclass(frozen=True)
class Attended:
    """What the last step needs: all of a layer but its output."""

    rows: Tensor
    """[S, B, H, D], attended to."""
    dealt: Tensor
    """The same as the inner attention gave them: before they were dealt back to the ranks that hold their entries."""
    selection: Selection
    steps: Steps
    halo: Tensor | None = None
    """Under context parallelism, the rows that spill into this rank's chunks."""
    travel: HaloTravel | None = None
    """By which the halo comes."""
    passage: Passage | None = None
    """What is under way where the inner attention is a ring."""

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
    """Where context-parallel ranks select alone: of this rank's tiles. Else rows are dealt."""
    pin_first: bool
    causal: bool
    """Whether the selection rests on no later token."""
    steps: Steps
    scorer: Scorer
    exchange: Exchange | None
    gather: Callable[..., tuple[Tensor, ...]]
    """What rows are, of what is around: see `Variant.gather`."""
    attend: RowAttention | None
    """The inner attention; None where every call brings its own."""
    heads_per_selection: int
    """Key/value heads that share a selection."""
    rotary: Rotary | None
    """By which rows are turned on to their window's last token while they are pooled."""

    @property
    def rule(self) -> tuple[bool, bool]:
        """(pin_first, causal), as `Steps.select` takes them."""
        return self.pin_first, self.causal

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *streams: Tensor,
        attend: Callable[..., Tensor] | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """[N, B, H, D]: see `lighthouse_attention`."""
        return self.attended(query, key, value, *streams, attend=attend, sinks=sinks).scatter()

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
        """All steps but the last, which must follow: the halo is under way until then."""
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
            scores, deal = self.scorer(query, key, value, self.own, self.steps, self.exchange, self.rotary), None
            scores = summed(scores, self.heads_per_selection)
            if self.exchange is None:
                selection = self.steps.select(scores, self.geometry, *self.rule)
            else:
                selection, deal = select_shard(scores, self.geometry, self.own_tiles, *self.rule, self.steps, self.exchange)
            telemetry.record(selection, scores, self.geometry, *self.rule, self.steps, self.scorer.causal)
        return selection, deal


def build(
    config: LighthouseConfig,
    query: Tensor,
    key: Tensor,
    exchange: Exchange | None = None,
    comm_type: str = "p2p",
    softmax_scale: float | None = None,
    own_attend: bool = False,
    rotary: Rotary | None = None,
    sinks: bool = False,
    value_dim: int | None = None,
    around: Any = None,
) -> Layer:
    """The layer for inputs like these.

    Args:
        query: [N/C, B, H, D]; key: [N/C, B, G, D]; of these only shapes, dtype and device count.
        own_attend: every call brings its inner attention.
        rotary: what queries and keys are rotated by, where pooled rows are to stand at their window's last token.
        sinks: every call brings a sink for each head.
        value_dim: of the values, where it is not D.
        around: the config of the attention that `config.around` names; None for its defaults.


    Raises:
        ValueError: as `lighthouse_attention`.
    """
    base = AROUND[config.around]
    if rotary is not None and (problem := rotary.problem(query.shape[3]) or base.rotary_problem()):
        raise ValueError(problem)
    if problem := heads_problem(config, key.shape[2], query.shape[3], value_dim):
        raise ValueError(problem)
    size = exchange.size if exchange else 1
    geometry = config.geometry(query.shape[0] * size, size)
    attend: RowAttention | None = None
    if not own_attend:
        how = (exchange, comm_type, softmax_scale, sinks, value_dim)
        rows_q, rows_k = (x[:1].expand(geometry.gathered_length // size, -1, -1, -1) for x in (query, key))
        attend = base.build_rows(around, config.inner, rows_q, rows_k, *how)
    steps = steps_for(config.steps, query, config.pooling)
    own, tiles = Tiled(query.shape[0], config.levels, config.pooling, geometry.tile), own_tiles(geometry, size)
    scorer, shared = SCORERS[config.scorer], config.heads_per_selection or 1
    rule = (config.pin_first, config.causal_selection)
    return Layer(geometry, own, tiles, *rule, steps, scorer, exchange, base.gather, attend, shared, rotary)
