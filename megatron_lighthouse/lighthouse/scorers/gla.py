"""The gla scorer: as `dilated`, but by linear attention that forgets, in time of N instead of N²."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_lighthouse.lighthouse.geometry import Pyramid, Shape
from megatron_lighthouse.lighthouse.scorers.base import Scorer
from megatron_lighthouse.lighthouse.scorers.both_ways import both_ways_moved
from megatron_lighthouse.lighthouse.scorers.streams import DELTA

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from megatron_lighthouse.context_parallel.exchange import Exchange
    from megatron_lighthouse.lighthouse.rotary import Rotary
    from megatron_lighthouse.lighthouse.steps import Steps

SEGMENT = 512
"""Positions of a stream that are worked through at once. The state that a segment starts from is folded over all segments
before it, in their order: the same sum for any number of ranks whose chunks are whole segments (of 4 * 512 tokens)."""
BLOCK = 64
"""Positions that plain PyTorch multiplies with each other at a time."""
SEED = 20260506
"""Of the gate's weights."""


@dataclass(frozen=True)
class Gla(Scorer):
    """Each stream runs through simple gated linear attention, both ways; the norms of the rows are scored (paper, "gla").

    o_t = q_t S_t / sqrt(D), where S_t = exp(g_t) S_{t-1} + k_t^T v_t and g_t = logsigmoid(w·x_t) / 16. In the paper x is the
    layer's input, with one w a head, that never receives a gradient. Core attention does not see that input: here x is the
    mean query of the group, and w one fixed random vector (ours). Grouped queries are taken as by `dilated` (ours).

    On a GPU flash-linear-attention runs it, in the dtype of the inputs; with the reference steps plain PyTorch does.
    """

    name: str = "gla"
    reads_values: bool = True
    by_length: bool = False
    grows: str = "N"
    unit: int = DELTA
    same_bits: bool = False

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pyramid: Pyramid,
        steps: Steps,
        exchange: Exchange | None,
        rotary: Rotary | None = None,
        scale: float | None = None,
    ) -> Tensor:
        from megatron_lighthouse.lighthouse.scorers import linear

        self.check_length(query.shape[0], exchange)
        return linear.scores(query, key, value, pyramid, steps, exchange)

    def moved(self, pyramid: Pyramid, shape: Shape) -> float:
        """Both ways twice over: the states that segments end with, then the rows."""
        return 2 * both_ways_moved(pyramid.seq_length, shape)

    def flops(self, pyramid: Pyramid, shape: Shape) -> float:
        """Products within blocks, with the state before them, and into it; both ways twice over."""
        row = 4.0 * shape.dim * (BLOCK + shape.dim)
        return 2 * pyramid.seq_length * shape.batch * (shape.heads + shape.groups) * row

    def sent(self, pyramid: Pyramid, shape: Shape, size: int) -> int:
        """The state and the gate of each segment of each stream, both ways."""
        positions = pyramid.seq_length // size // 2 // DELTA
        segments = 2 * -(-positions // min(SEGMENT, positions)) * DELTA
        return (size - 1) * 2 * segments * shape.batch * shape.groups * (shape.dim**2 + 1) * max(4, shape.itemsize)

    def check_installed(self, steps: Steps, device: torch.device) -> None:
        from megatron_lighthouse.lighthouse.scorers.linear import linear_attention

        linear_attention(steps, device)
