"""The norm scorer: a token counts as much as its query and its key are long."""

from __future__ import annotations

from torch import Tensor

from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.lighthouse.geometry import Pyramid
from megatron_lighthouse.lighthouse.steps import Steps


def norm(query: Tensor, key: Tensor, value: Tensor, pyramid: Pyramid, steps: Steps, exchange: Exchange | None) -> Tensor:
    """s^Q_j = ‖Q_j‖₂ and s^K_j = ‖K_j‖₂ (paper, "norm" scorer): the rows are scored as they are."""
    return steps.score(query, key, pyramid)
