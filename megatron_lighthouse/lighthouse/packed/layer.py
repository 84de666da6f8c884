"""A layer over packed documents: what their number and lengths do not decide, decided once; its calls only compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_lighthouse.context_parallel.exchange import Exchange
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


@dataclass(frozen=True)
class PackedAttended:
    """What the last step needs: all of a layer but its output."""

    rows: Tensor
    """[S, 1, H, D], attended to."""
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
    """What rows are, of what is around: see `Variant.gather`."""
    attend: Callable[..., Tensor] | None
    """The inner attention, of rows, documents and the rows of streams; None where every call brings its own."""
    rotary: Rotary | None
    """By which rows are turned on to their window's last token while they are pooled."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *streams: Tensor,
        documents: Documents,
        attend: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """[t, 1, H, D]: see `lighthouse_attention`."""
        return self.attended(query, key, value, *streams, documents=documents, attend=attend).scatter()

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
        """All steps but the last."""
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
            scores = self.scorer.packed(query, key, value, packing, self.steps, self.rotary)
            selection = self.steps.select(scores, packing, self.pin_first)
            telemetry.record(selection, scores, packing, self.pin_first, False, self.steps, self.scorer.causal)
            return selection


def build_packed(
    config: LighthouseConfig,
    query: Tensor,
    key: Tensor,
    softmax_scale: float | None = None,
    own_attend: bool = False,
    rotary: Rotary | None = None,
    around: Any = None,
    exchange: Exchange | None = None,
    comm_type: str = "p2p",
    value_dim: int | None = None,
    sinks: bool = False,
) -> PackedLayer | ShardedPackedLayer:
    """The layer for rows of documents like these.

    Args:
        query: [t, 1, H, D]; key: [t, 1, G, D]; of these only heads, D, dtype and device count.
        own_attend: every call brings its inner attention.
        rotary: what queries and keys are rotated by, where pooled rows are to stand at their window's last token.
        around: as for `lighthouse.layer.build`.
        exchange: the ranks that share the row; then `query` and `key` are of [t / C, ...].
        value_dim: of the values, where it is not D.
        sinks: every call brings a sink for each head.

    Raises:
        ValueError: as `lighthouse_attention`.
    """
    scorer, rule = SCORERS[config.scorer], config.rule
    base = AROUND[config.around]
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
        if not own_attend:
            attend = base.build_document_rows(around, config.inner, query, key, softmax_scale, value_dim, sinks)
        return PackedLayer(rule, config.pin_first, steps, scorer, base.gather, attend, rotary)
    if not base.native:
        raise ValueError(
            f"cu_seqlens over context-parallel ranks is not done with config.around {config.around}: use config.around "
            "softmax, or one rank."
        )
    if not own_attend:
        how = (exchange, comm_type, softmax_scale, value_dim, None, sinks)
        attend = sharded_documents_attention(config.inner, query, key, *how)
    return ShardedPackedLayer(rule, config.pin_first, steps, scorer, attend, rotary, exchange)
