"""Scorers: what ranks the entries of the pyramid. One file a scorer, one line in this registry."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.lighthouse.geometry import Pyramid
from megatron_lighthouse.lighthouse.scorers.dilated import dilated
from megatron_lighthouse.lighthouse.scorers.gla import gla, linear_attention
from megatron_lighthouse.lighthouse.scorers.norm import norm
from megatron_lighthouse.lighthouse.scorers.streams import stream_problem
from megatron_lighthouse.lighthouse.scorers.summary import summary
from megatron_lighthouse.lighthouse.steps import Steps

Scorer = Callable[[Tensor, Tensor, Tensor, Pyramid, Steps, Exchange | None], Tensor]
"""(query [n, B, H, D], key and value [n, B, G, D], of this rank's tokens, their pyramid, …) -> [2, B, G, coarse length], fp32
(fp64 for fp64): s^Q, then s^K, of the entries of levels 1..L-1, in the order of the concatenated pyramid. The numbers do not
depend on how many ranks there are (those of `gla` only but for rounding: see there); `Exchange` connects these,
and is None where there is one. Called without gradients."""

SCORERS: dict[str, Scorer] = {"norm": norm, "dilated": dilated, "gla": gla, "summary": summary}


def problem(scorer: str, seq_length: int, size: int) -> str | None:
    """Why `scorer` cannot rank a sequence of `seq_length` tokens on `size` context-parallel ranks; None where it can."""
    return stream_problem(scorer, seq_length, size) if scorer in ("dilated", "gla") else None


def check_installed(scorer: str, steps: Steps, device: torch.device) -> None:
    """Refuse a scorer whose package is missing on `device`, beside the steps that run there.

    Raises:
        ValueError: the package, and what works without it.
    """
    if scorer == "gla":
        linear_attention(steps, device)
