"""A scorer outside the package, by the checklist of docs/extend.md: the greatest coordinate of a token's query and key."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.lighthouse.geometry import Pyramid
from megatron_lighthouse.lighthouse.reference import window_maxima
from megatron_lighthouse.lighthouse.rotary import Rotary
from megatron_lighthouse.lighthouse.scorers.base import Scorer, Shape, row_bytes
from megatron_lighthouse.lighthouse.steps import Steps
from tests.oracle import Array


@dataclass(frozen=True)
class Greatest(Scorer):
    """s^Q of a token is the greatest |coordinate| of its group's queries, s^K that of its key (for tests)."""

    name: str = "greatest"
    reads_values: bool = False
    by_length: bool = False
    grows: str = "N"

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
        of_query = query.unflatten(2, (key.shape[2], -1)).abs().amax((-1, -2))
        return window_maxima(torch.stack([of_query, key.abs().amax(-1)]).permute(0, 2, 3, 1), pyramid)

    def moved(self, pyramid: Pyramid, shape: Shape) -> float:
        return row_bytes(pyramid.seq_length, shape, shape.heads + shape.groups)

    def flops(self, pyramid: Pyramid, shape: Shape) -> float:
        return 0.0


def greatest_oracle(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    """The same of one group: q [N, R, D], k and v [N, D]."""
    return np.abs(q).max((1, 2)), np.abs(k).max(1)
