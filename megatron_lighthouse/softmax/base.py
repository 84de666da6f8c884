"""What the blocks of softmax attention share."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from megatron_lighthouse.context_parallel.parts import Part


@dataclass(frozen=True)
class Softmax:
    """A block's scale, window and output: near is the query, far key and value, and the one average is the output."""

    scale: float
    window: int | None = None
    """Rows before its own that a row sees; None: all. With it the near rows are the last of the far ones."""

    def output(self, part: Part) -> Tensor:
        return part.averages[0]

    @property
    def flash_options(self) -> dict[str, float]:
        """Of torch's FlashAttention 2, whose window is counted from the last near and the last far row."""
        window = {} if self.window is None else {"window_size_left": self.window, "window_size_right": 0}
        return {"scale": self.scale, **window}


def scale_of(query: Tensor, softmax_scale: float | None) -> float:
    """1/sqrt(D) where none is given."""
    return 1 / math.sqrt(query.shape[-1]) if softmax_scale is None else softmax_scale


def scaled(products: Tensor, query: Tensor, scale: float | None) -> Tensor:
    """The logits of products of queries and keys; divided, so that 1/sqrt(D) gives the bits that it always gave."""
    return products / (1 / scale_of(query, scale))


def batch_first(*tensors: Tensor) -> list[Tensor]:
    """[n, B, H, D] -> [B, n, H, D], or back, as views."""
    return [x.transpose(0, 1) for x in tensors]
