"""A layer over packed documents whose tokens lie on several ranks, in document zigzag: the steps, and what ranks send.

Nothing is sent document by document: tokens go to the ranks that own their windows, scores of all windows to all ranks, and
rows to where they are attended to and back, each in one message for all documents. So selections are those of one rank to the
last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.context_parallel.transfer import Transfer
from megatron_lighthouse.lighthouse import telemetry
from megatron_lighthouse.lighthouse.packed.deal import DocumentDeal
from megatron_lighthouse.lighthouse.packed.packing import Packing
from megatron_lighthouse.lighthouse.packed.rule import Rule
from megatron_lighthouse.lighthouse.packed.shares import Shares
from megatron_lighthouse.lighthouse.packed.steps import PackedSteps
from megatron_lighthouse.lighthouse.rotary import Rotary
from megatron_lighthouse.lighthouse.scorers.base import Scorer
from megatron_lighthouse.lighthouse.selection import Selection
from megatron_lighthouse.once import once_differentiable
from megatron_lighthouse.ranges import profiled
from megatron_lighthouse.sequence.documents import Documents


@dataclass(frozen=True)
class ShardedAttended:
    """What the last step needs, of this rank's tokens."""

    rows: Tensor
    """[·, 1, H, D], attended to, and dealt back; of whole documents alone, the output."""
    selection: Selection | None
    """Of these, among the entries of this rank's pieces; None where all documents go in whole."""
    own_at: Tensor | None
    """This rank's tokens among those of its pieces."""
    steps: PackedSteps

    @property
    def is_whole(self) -> bool:
        """Whether all documents go in whole, so that rows are tokens."""
        return self.selection is None

    def scatter(self) -> Tensor:
        """[t / C, 1, H, D]: the layer's output."""
        if self.selection is None or self.own_at is None:
            return self.rows
        own: Tensor = _Own.apply(self.steps.scatter(self.rows, self.selection), self.own_at)
        return own


@dataclass(frozen=True)
class ShardedPackedLayer:
    """As `PackedLayer`, for this rank's tokens."""

    rule: Rule
    pin_first: bool
    steps: PackedSteps
    scorer: Scorer
    attend: Callable[..., Tensor] | None
    """The inner attention over the rows of all ranks; None where every call brings its own."""
    rotary: Rotary | None
    scale: float | None
    exchange: Exchange

    def attended(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        documents: Documents,
        attend: Callable[..., Tensor] | None = None,
        sinks: Tensor | None = None,
    ) -> ShardedAttended:
        """All steps but the last, `ShardedAttended.scatter`, of this rank's [t / C, 1, ·, D]; see `Layer.attended`."""
        attend, packing = attend or self.attend, Packing.of(documents, self.rule)
        assert attend is not None
        own = () if sinks is None else (sinks,)
        if packing.is_whole:
            with profiled("attend"):
                return ShardedAttended(attend(query, key, value, documents, *own), None, None, self.steps)
        shares = Shares.of(packing, self.exchange.layout)
        query, key, value = self._aligned(query, key, value, shares)
        deal = DocumentDeal.of(self._chosen(query, key, value, shares), shares, self.exchange)
        query, key, value = deal.deal(*self.steps.gather(query, key, value, deal.gathered, self.rotary))
        with profiled("attend"):
            attended = attend(query, key, value, shares.rows, *own)
        return ShardedAttended(deal.deal_back(attended), deal.scattered, shares.cut.own_at, self.steps)

    def select(self, query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
        """[1, G, S / C] int64: the entries whose rows this rank attends to, as numbered without ranks; -1 for rows that fill
        up S to a multiple of 2C."""
        packing = Packing.of(documents, self.rule)
        if packing.is_whole:
            return documents.rows_of_rank(self.exchange.layout).expand(1, key.shape[2], -1)
        shares = Shares.of(packing, self.exchange.layout)
        indices = self._chosen(*self._aligned(query, key, value, shares), shares).indices
        return torch.nn.functional.pad(indices, (0, shares.rows.tokens - packing.gathered_length), value=-1)[
            ..., shares.own_rows
        ]

    def _aligned(self, query: Tensor, key: Tensor, value: Tensor, shares: Shares) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens of this rank's pieces that it owns, of those that ranks hold; differentiable."""
        query, key, value = Transfer(self.exchange, "align", shares.align)(query, key, value)
        return query, key, value

    def _chosen(self, query: Tensor, key: Tensor, value: Tensor, shares: Shares) -> Selection:
        """The entries of all documents, the same on all ranks."""
        with torch.no_grad():
            scores = self.scorer.shared(query, key, value, shares, self.steps, self.exchange, self.rotary, self.scale)
            selection = self.steps.select(scores, shares.packing, self.pin_first)
            telemetry.record(selection, scores, shares.packing, self.pin_first, False, self.steps, self.scorer.causal)
            return selection


class _Own(torch.autograd.Function):
    """Rows of x, none of them twice. What torch would do adds gradients up one by one, for it cannot know."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.rows, ctx.length = rows, len(x)
        return x.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        out = grad.new_zeros(ctx.length, *grad.shape[1:])
        return out.index_copy_(0, ctx.rows, grad), None
