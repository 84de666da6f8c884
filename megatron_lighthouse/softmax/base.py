"""What the blocks of softmax attention share."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from megatron_lighthouse.context_parallel.parts import Part


@dataclass(frozen=True)
class Softmax:
    """What the backends share."""

    scale: float
    window: int | None = None
    """Rows before its own that a row sees; None: all."""

    def output(self, part: Part) -> Tensor:
        return part.averages[0]


def scale_of(query: Tensor, softmax_scale: float | None) -> float:
    """1/sqrt(D) where none is given."""
    return 1 / math.sqrt(query.shape[-1]) if softmax_scale is None else softmax_scale


def batch_first(*tensors: Tensor) -> list[Tensor]:
    """[n, B, H, D] -> [B, n, H, D], or back, as views."""
    return [x.transpose(0, 1) for x in tensors]
