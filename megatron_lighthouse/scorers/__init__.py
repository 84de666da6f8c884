"""Scorers: what ranks the entries of the pyramid. One file a scorer, one line in this registry."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from megatron_lighthouse.geometry import Geometry
from megatron_lighthouse.scorers.norm import norm
from megatron_lighthouse.steps import Steps

Scorer = Callable[[Tensor, Tensor, Geometry, Steps], Tensor]
"""(query [N, B, H, D], key [N, B, G, D], …) -> what `Steps.score` gives, for the rows that the scorer ranks by."""

SCORERS: dict[str, Scorer] = {"norm": norm}
