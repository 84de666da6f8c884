"""The streams of the `dilated` and `gla` scorers: stream c holds the tokens ≡ c mod 4 (paper, δ = 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

DELTA = 4
"""δ, streams."""


def streams(x: Tensor) -> Tensor:
    """[n, B, H, D] -> [n/δ, δ*B, H, D]: the streams as batch elements. A view where x's first two strides allow it."""
    return x.unflatten(0, (-1, DELTA)).flatten(1, 2)


def tokens(scores: Tensor) -> Tensor:
    """What `streams` does to tokens, undone for scores: [2, δ*B, G, n/δ] -> [2, B, G, n]."""
    return scores.unflatten(1, (DELTA, -1)).permute(0, 2, 3, 4, 1).flatten(3)
