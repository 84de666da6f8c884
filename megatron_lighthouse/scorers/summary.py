"""The summary scorer: a coarsest window counts as much as attention among the coarsest windows makes of it."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.geometry import Pyramid
from megatron_lighthouse.reference import accumulation_dtype
from megatron_lighthouse.scorers.both_ways import attended_both_ways, ordered_mean
from megatron_lighthouse.steps import Steps


def summary(query: Tensor, key: Tensor, value: Tensor, pyramid: Pyramid, steps: Steps, exchange: Exchange | None) -> Tensor:
    """The coarsest level by causal attention over the coarsest pooled rows, both ways; finer levels as `norm` (ours).

    Unlike `norm` it looks at Q·K, and takes time of (N/F)² for that: F = p^(L-1) tokens are a coarsest window.
    """
    q, k, v = (coarsest(x, pyramid) for x in (query, key, value))
    top = attended_both_ways(q, k, v, steps, exchange)
    finer = steps.score(query, key, pyramid)[..., : -top.shape[-1]]
    return torch.cat([finer, top], -1)


def coarsest(x: Tensor, pyramid: Pyramid) -> Tensor:
    """The means of x's coarsest windows: [n, ...] -> [n/F, ...], by sums in fp32 (fp64 for fp64), in x's dtype."""
    mean = x.to(accumulation_dtype(x))
    for _ in range(1, pyramid.levels):
        mean = ordered_mean([mean[c :: pyramid.pooling] for c in range(pyramid.pooling)])
    return mean.to(x.dtype)
