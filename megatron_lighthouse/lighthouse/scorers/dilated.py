"""The dilated scorer: a token counts as much as attention among every fourth token makes of its query and its key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_lighthouse.lighthouse.geometry import Pyramid, Shape
from megatron_lighthouse.lighthouse.scorers.base import Scorer
from megatron_lighthouse.lighthouse.scorers.both_ways import (
    attended_both_ways,
    both_ways_flops,
    both_ways_moved,
    both_ways_sent,
    packed_both_ways,
    shared_both_ways,
)
from megatron_lighthouse.lighthouse.scorers.streams import DELTA, streams, tokens

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_lighthouse.context_parallel.exchange import Exchange
    from megatron_lighthouse.lighthouse.packed.packing import Packing
    from megatron_lighthouse.lighthouse.packed.shares import Shares
    from megatron_lighthouse.lighthouse.packed.steps import PackedSteps
    from megatron_lighthouse.lighthouse.rotary import Rotary
    from megatron_lighthouse.lighthouse.steps import Steps


@dataclass(frozen=True)
class Dilated(Scorer):
    """Each stream attends causally to itself, both ways; the norms of the rows are scored (paper, "dilated" scorer).

    Under context parallelism each rank holds the keys, queries and values of all.
    """

    name: str = "dilated"
    reads_values: bool = True
    by_length: bool = False
    grows: str = f"N²/{DELTA}"
    unit: int = DELTA
    by_scale: bool = True
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
        from megatron_lighthouse.lighthouse.reference import window_maxima

        self.check_length(query.shape[0], exchange)
        norms = attended_both_ways(streams(query), streams(key), streams(value), steps, exchange, scale)
        return window_maxima(tokens(norms), pyramid)

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
        from megatron_lighthouse.lighthouse.packed.maps import Maps
        from megatron_lighthouse.lighthouse.reference import window_maxima

        inside = Maps.of(packing).inside
        q, k, v = (streams(x[inside]) for x in (query, key, value))
        norms = packed_both_ways(q, k, v, steps, packing.compact_documents(DELTA), scale)
        return window_maxima(tokens(norms), packing.compact)

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
        from megatron_lighthouse.lighthouse.reference import window_maxima

        q, k, v = (streams(x[shares.own_inside]) for x in (query, key, value))
        norms = shared_both_ways(q, k, v, steps, shares, DELTA, exchange, scale)
        pyramid = Pyramid(len(shares.own_inside), *shares.packing.pyramid[1:])
        return shares.whole_scores(window_maxima(tokens(norms), pyramid), exchange)

    def moved(self, pyramid: Pyramid, shape: Shape) -> float:
        return both_ways_moved(pyramid.seq_length, shape)

    def flops(self, pyramid: Pyramid, shape: Shape) -> float:
        return both_ways_flops(pyramid.seq_length // DELTA, DELTA * shape.batch, shape)

    def sent(self, pyramid: Pyramid, shape: Shape, size: int) -> int:
        return both_ways_sent(pyramid.seq_length // size, shape, size)
