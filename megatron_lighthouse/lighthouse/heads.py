"""Key/value heads that share one selection (ours), for models with many of them, such as MLA."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_lighthouse.lighthouse.causal_rules import scorers_for
from megatron_lighthouse.lighthouse.config import LighthouseConfig
from megatron_lighthouse.lighthouse.scorers import SCORERS
from megatron_lighthouse.nearest import around, either

if TYPE_CHECKING:
    from torch import Tensor

NAME = "config.heads_per_selection"


def summed(scores: Tensor, heads: int) -> Tensor:
    """Scores [2, B, G, n], summed over so many heads at a time: [2, B, G / heads, n], in the order of the heads."""
    if heads == 1:
        return scores
    from megatron_lighthouse.sums import one_by_one

    return one_by_one(scores.unflatten(2, (-1, heads)), 3)


def heads_problem(config: LighthouseConfig, groups: int, dim: int, value_dim: int | None) -> str | None:
    """Why a layer cannot have `groups` key/value heads, of so many channels; None where it can."""
    shared = config.heads_per_selection or 1
    if groups % shared:
        use = either(around(shared, lambda n: groups % n == 0, groups))
        return f"{NAME} {shared} must divide the {groups} key/value heads of a tensor-parallel rank: use {use}."
    if SCORERS[config.scorer].reads_values and value_dim not in (None, dim):
        fits_all = " or ".join(name for name in scorers_for(config) if not SCORERS[name].reads_values)
        return (
            f"config.scorer {config.scorer} reads values of as many channels as keys, and these have {value_dim} and {dim}: "
            f"use config.scorer {fits_all}."
        )
    return None


def documents_problem(config: LighthouseConfig) -> str | None:
    """Why heads cannot share selections in packed documents; None where they do not."""
    shared = config.heads_per_selection
    return None if shared in (0, 1) else f"{NAME} {shared} is not done for packed documents: use {NAME} 1."
