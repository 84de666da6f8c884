"""Scorers: what ranks the entries of the pyramid. One file a scorer, one line in this registry."""

from __future__ import annotations

from megatron_lighthouse.lighthouse.scorers.base import Scorer
from megatron_lighthouse.lighthouse.scorers.dilated import Dilated
from megatron_lighthouse.lighthouse.scorers.gla import Gla
from megatron_lighthouse.lighthouse.scorers.mass import Mass
from megatron_lighthouse.lighthouse.scorers.norm import Norm
from megatron_lighthouse.lighthouse.scorers.summary import Summary

SCORERS: dict[str, Scorer] = {}
"""By their names in `config.scorer`."""


def register(scorer: Scorer) -> None:
    """Let a scorer be named. Raises ValueError where another has its name."""
    if scorer.name in SCORERS:
        raise ValueError(f"scorer {scorer.name!r} is there already: give it another name than {' or '.join(SCORERS)}.")
    SCORERS[scorer.name] = scorer


for _scorer in (Norm(), Mass(), Dilated(), Gla(), Summary()):
    register(_scorer)
