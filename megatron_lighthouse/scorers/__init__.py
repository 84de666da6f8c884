"""Scorers: what ranks the entries of the pyramid. One file a scorer, one line in this registry."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from megatron_lighthouse.scorers.norm import norm_scores

Scorer = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(query [N, B, H, D], key [N, B, G, D]) -> level-0 scores (s^Q, s^K), each [B, G, N], fp32 or wider, no gradient."""

SCORERS: dict[str, Scorer] = {"norm": norm_scores}
