"""The norm scorer: a token counts as much as its query and its key are long."""

from __future__ import annotations

from torch import Tensor

from megatron_lighthouse.geometry import Geometry
from megatron_lighthouse.steps import Steps


def norm(query: Tensor, key: Tensor, geometry: Geometry, steps: Steps) -> Tensor:
    """s^Q_j = ‖Q_j‖₂ and s^K_j = ‖K_j‖₂ (paper, "norm" scorer): the rows are scored as they are."""
    return steps.score(query, key, geometry)
