"""The summary scorer: a coarsest window counts as much as attention among the coarsest windows makes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_lighthouse.lighthouse.geometry import Pyramid, Shape
from megatron_lighthouse.lighthouse.scorers.base import Scorer, row_bytes
from megatron_lighthouse.lighthouse.scorers.both_ways import (
    attended_both_ways,
    both_ways_flops,
    both_ways_moved,
    both_ways_sent,
    packed_both_ways,
    shared_both_ways,
)

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_lighthouse.context_parallel.exchange import Exchange
    from megatron_lighthouse.lighthouse.packed.packing import Packing
    from megatron_lighthouse.lighthouse.packed.shares import Shares
    from megatron_lighthouse.lighthouse.packed.steps import PackedSteps
    from megatron_lighthouse.lighthouse.rotary import Rotary
    from megatron_lighthouse.lighthouse.steps import Steps


@dataclass(frozen=True)
class Summary(Scorer):
    """The coarsest level by causal attention over the coarsest pooled rows, both ways; finer levels as `norm` (ours).

    Unlike `norm` it looks at Q·K.
    """

    name: str = "summary"
    reads_values: bool = True
    by_length: bool = True
    grows: str = "(N/F)²"
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
        import torch

        q, k, v = coarsest(query, key, value, pyramid, steps, rotary)
        top = attended_both_ways(q, k, v, steps, exchange, scale)
        finer = steps.score(query, key, pyramid)[..., : -top.shape[-1]]
        return torch.cat([finer, top], -1)

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
        import torch

        q, k, v = coarsest(query, key, value, packing, steps, rotary)
        top = packed_both_ways(q, k, v, steps, packing.compact_documents(packing.rule.window), scale)
        return torch.cat([steps.score(query, key, packing)[..., : -top.shape[-1]], top], -1)

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
        import torch

        q, k, v = (x[shares.own_windows] for x in coarsest(query, key, value, shares.pieces, steps, rotary))
        top = shared_both_ways(q, k, v, steps, shares, shares.window, exchange, scale)
        finer = shares.own_scores(steps.score(query, key, shares.pieces))[..., : -len(q) or None]
        return shares.whole_scores(torch.cat([finer, top], -1), exchange)

    def moved(self, pyramid: Pyramid, shape: Shape) -> float:
        """The scores of `norm`, what the coarsest rows are pooled of, and these."""
        rows = pyramid.entries(pyramid.levels - 1)
        return row_bytes(pyramid.seq_length, shape, 2 * shape.heads + 3 * shape.groups) + both_ways_moved(rows, shape)

    def flops(self, pyramid: Pyramid, shape: Shape) -> float:
        return both_ways_flops(pyramid.entries(pyramid.levels - 1), shape.batch, shape)

    def sent(self, pyramid: Pyramid, shape: Shape, size: int) -> int:
        return both_ways_sent(pyramid.entries(pyramid.levels - 1) // size, shape, size)


def coarsest(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pyramid: Pyramid,
    steps: Steps | PackedSteps,
    rotary: Rotary | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The means of the coarsest windows: [n, ...] -> [n/F, ...] for each of the three, as `Steps.gather` makes them."""
    import torch

    from megatron_lighthouse.lighthouse.selection import Selection

    windows = pyramid.entries(pyramid.levels - 1)
    places = query.new_full((query.shape[1], key.shape[2], pyramid.pyramid_length), -1, dtype=torch.int32)
    places[..., pyramid.pyramid_length - windows :] = torch.arange(windows, dtype=torch.int32, device=query.device)
    return steps.gather(query, key, value, Selection(pyramid, places, windows), rotary=rotary)
