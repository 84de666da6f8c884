"""Scorers: what ranks the entries of the pyramid. One file a scorer, one line in this registry."""

from __future__ import annotations

from megatron_lighthouse.lighthouse.scorers.base import Scorer
from megatron_lighthouse.lighthouse.scorers.dilated import Dilated
from megatron_lighthouse.lighthouse.scorers.gla import Gla
from megatron_lighthouse.lighthouse.scorers.norm import Norm
from megatron_lighthouse.lighthouse.scorers.summary import Summary

SCORERS: dict[str, Scorer] = {scorer.name: scorer for scorer in (Norm(), Dilated(), Gla(), Summary())}
