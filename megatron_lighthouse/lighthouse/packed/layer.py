"""A Lighthouse layer over packed documents. `build_packed` decides once all that does not depend on the documents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_lighthouse.lighthouse import telemetry
from megatron_lighthouse.lighthouse.around import AROUND
from megatron_lighthouse.lighthouse.causal_rules import causal_documents_problem
from megatron_lighthouse.lighthouse.config import LighthouseConfig
from megatron_lighthouse.lighthouse.heads import documents_problem, heads_problem
from megatron_lighthouse.lighthouse.implementations import packed_steps_for
from megatron_lighthouse.lighthouse.packed.packing import Packing
from megatron_lighthouse.lighthouse.packed.rule import Rule
from megatron_lighthouse.lighthouse.packed.sharded import ShardedPackedLayer
from megatron_lighthouse.lighthouse.packed.steps import PackedSteps
from megatron_lighthouse.lighthouse.rotary import Rotary
from megatron_lighthouse.lighthouse.scorers import SCORERS
from megatron_lighthouse.lighthouse.scorers.base import Scorer
from megatron_lighthouse.lighthouse.selection import Selection
from megatron_lighthouse.ranges import profiled
from megatron_lighthouse.sequence.documents import Documents
from megatron_lighthouse.softmax.sharded_documents import sharded_documents_attention
from megatron_lighthouse.variant import Place


@dataclass(frozen=True)
class PackedAttended:
    """A layer's state after the inner attention: what the last step, scatter, needs."""

    rows: Tensor
    """[S, 1, H, D], the inner attention's output."""
    selection: Selection
    steps: PackedSteps

    @property
    def is_whole(self) -> bool:
        """Whether all documents go in whole, so that rows are tokens."""
        packing = self.selection.geometry
        assert isinstance(packing, Packing)
        return packing.is_whole

    def scatter(self) -> Tensor:
        """[t, 1, H, D]: the layer's output."""
        return self.rows if self.is_whole else self.steps.scatter(self.rows, self.selection)


@dataclass(frozen=True)
class PackedLayer:
    """Lighthouse for rows of documents, of one shape."""

    rule: Rule
    pin_first: bool
    steps: PackedSteps
    scorer: Scorer
    gather: Callable[..., tuple[Tensor, ...]]
    """Makes rows of queries, keys, values and streams: `TakesRows.gather` of the attention that `config.around` names."""
    attend: Callable[..., Tensor] | None
    """The inner attention, of rows, documents and the rows of streams; None where every call brings its own."""
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
        documents: Documents,
        attend: Callable[..., Tensor] | None = None,
        selection: Selection | None = None,
        sinks: Tensor | None = None,
    ) -> PackedAttended:
        """All steps but the last, `PackedAttended.scatter`, of [t, 1, ·, D]; see `Layer.attended`."""
        attend, packing = attend or self.attend, Packing.of(documents, self.rule)
        assert attend is not None
        if selection is None:
            selection = self.select(query, key, value, documents)
        rows: tuple[Tensor, ...] = (query, key, value, *streams)
        if not packing.is_whole:  # else rows are tokens
            take = partial(self.steps.gather, selection=selection, rotary=self.rotary)
            rows = self.gather(take, selection, *rows)
        others = rows[3:] if sinks is None else (*rows[3:], sinks)
        with profiled("attend"):
            attended = attend(*rows[:3], packing.rows, *others)
        return PackedAttended(attended, selection, self.steps)

    def select(self, query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Selection:
        """The entries of all documents."""
        packing = Packing.of(documents, self.rule)
        if packing.is_whole:
            places = torch.arange(packing.seq_length, dtype=torch.int32, device=query.device)
            return Selection(packing, places.expand(1, key.shape[2], -1), packing.seq_length)
        with torch.no_grad():
            scores = self.scorer.packed(query, key, value, packing, self.steps, self.rotary, self.scale)
            selection = self.steps.select(scores, packing, self.pin_first)
            telemetry.record(selection, scores, packing, self.pin_first, False, self.steps, self.scorer.causal)
            return selection


def build_packed(config: LighthouseConfig, query: Tensor, key: Tensor, place: Place) -> PackedLayer | ShardedPackedLayer:
    """The layer for rows of documents like these.

    Args:
        query: [t/C, 1, H, D]; key: [t/C, 1, G, D]; of these only heads, D, dtype and device count.
        place: as for `lighthouse.layer.build`; its ranks share the row.

    Raises:
        ValueError: as `lighthouse_attention`.
    """
    scorer, rule, base = SCORERS[config.scorer], config.rule, AROUND[config.around]
    rotary, value_dim, exchange = place.rotary, place.value_dim, place.exchange
    if rotary is not None and (problem := rotary.problem(query.shape[3]) or base.rotary_problem()):
        raise ValueError(problem)
    if problem := scorer.packed_problem(rule.window) or documents_problem(config) or causal_documents_problem(config):
        raise ValueError(problem)
    if problem := heads_problem(config, key.shape[2], query.shape[3], value_dim):
        raise ValueError(problem)
    if not base.native and value_dim not in (None, query.shape[3]):
        raise ValueError(
            f"cu_seqlens with config.around {config.around} is for values of the D of keys, {query.shape[3]}, not {value_dim}: "
            "pad them with zeros, or use config.around softmax."
        )
    steps, attend = packed_steps_for(config.steps, query, config.pooling), None
    if exchange is None:
        if not place.base_attends:
            attend = base.build_document_rows(config.inner, query, key, place)
        return PackedLayer(rule, config.pin_first, steps, scorer, base.gather, attend, rotary, place.scale)
    if not base.native:
        raise ValueError(
            f"cu_seqlens over context-parallel ranks is not done with config.around {config.around}: use config.around "
            "softmax, or one rank."
        )
    if not place.base_attends:
        how = (config.inner, query, key, exchange, place.comm_type, place.scale)
        attend = sharded_documents_attention(*how, value_dim=value_dim, sinks=place.sinks)
    return ShardedPackedLayer(rule, config.pin_first, steps, scorer, attend, rotary, place.scale, exchange)
