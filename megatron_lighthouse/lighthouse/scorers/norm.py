"""The norm scorer: a token counts as much as its query and its key are long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_lighthouse.lighthouse.geometry import Pyramid, Shape
from megatron_lighthouse.lighthouse.scorers.base import Scorer, row_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_lighthouse.context_parallel.exchange import Exchange
    from megatron_lighthouse.lighthouse.packed.packing import Packing
    from megatron_lighthouse.lighthouse.packed.shares import Shares
    from megatron_lighthouse.lighthouse.packed.steps import PackedSteps
    from megatron_lighthouse.lighthouse.rotary import Rotary
    from megatron_lighthouse.lighthouse.steps import Steps


@dataclass(frozen=True)
class Norm(Scorer):
    """s^Q_j = ‖Q_j‖₂ and s^K_j = ‖K_j‖₂ (paper, "norm" scorer): the rows are scored as they are."""

    name: str = "norm"
    reads_values: bool = False
    by_length: bool = True
    grows: str = "N"
    shares: bool = True

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pyramid: Pyramid,
        steps: Steps,
        exchange: Exchange | None,
        rotary: Rotary | None = None,
        scale: float | None = None,
    ) -> Tensor:
        return steps.score(query, key, pyramid)

    def packed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        packing: Packing,
        steps: PackedSteps,
        rotary: Rotary | None = None,
        scale: float | None = None,
    ) -> Tensor:
        return steps.score(query, key, packing)

    def shared(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        shares: Shares,
        steps: PackedSteps,
        exchange: Exchange,
        rotary: Rotary | None = None,
        scale: float | None = None,
    ) -> Tensor:
        return shares.whole_scores(shares.own_scores(steps.score(query, key, shares.pieces)), exchange)

    def moved(self, pyramid: Pyramid, shape: Shape) -> float:
        return row_bytes(pyramid.seq_length, shape, shape.heads + shape.groups)

    def flops(self, pyramid: Pyramid, shape: Shape) -> float:
        return 0.0
