"""The summary scorer: a coarsest window counts as much as attention among the coarsest windows makes of it."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.lighthouse.geometry import Pyramid
from megatron_lighthouse.lighthouse.scorers.both_ways import attended_both_ways
from megatron_lighthouse.lighthouse.selection import Selection
from megatron_lighthouse.lighthouse.steps import Steps


def summary(query: Tensor, key: Tensor, value: Tensor, pyramid: Pyramid, steps: Steps, exchange: Exchange | None) -> Tensor:
    """The coarsest level by causal attention over the coarsest pooled rows, both ways; finer levels as `norm` (ours).

    Unlike `norm` it looks at Q·K, and takes time of (N/F)² for that: F = p^(L-1) tokens are a coarsest window.
    """
    q, k, v = coarsest(query, key, value, pyramid, steps)
    top = attended_both_ways(q, k, v, steps, exchange)
    finer = steps.score(query, key, pyramid)[..., : -top.shape[-1]]
    return torch.cat([finer, top], -1)


def coarsest(query: Tensor, key: Tensor, value: Tensor, pyramid: Pyramid, steps: Steps) -> tuple[Tensor, Tensor, Tensor]:
    """The means of the coarsest windows: [n, ...] -> [n/F, ...] for each of the three, as `Steps.gather` makes them."""
    windows = query.shape[0] // pyramid.window(pyramid.levels - 1)
    places = query.new_full((query.shape[1], key.shape[2], pyramid.pyramid_length), -1, dtype=torch.int32)
    places[..., -windows:] = torch.arange(windows, dtype=torch.int32, device=query.device)
    return steps.gather(query, key, value, Selection(pyramid, places, windows))
