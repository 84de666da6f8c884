"""Selection: which entries of the pyramid a layer attends to, in both directions."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_lighthouse.geometry import Geometry


@dataclass(frozen=True)
class Selection:
    """The gathered entries of one layer, as a list and as the inverse map. Carries no gradient.

    With the inverse map both directions of gather and of scatter are gathers: no atomics, and
    every element is written once.
    """

    geometry: Geometry
    indices: Tensor
    """[B, G, S] int64: the entries in causal order, numbered in the concatenated pyramid (level 0 first)."""
    rows: tuple[Tensor, ...]
    """Per level l a [B, G, N/p^l] int64 tensor: the place in 0..S-1 that entry (l, i) has, or -1 if not gathered."""
