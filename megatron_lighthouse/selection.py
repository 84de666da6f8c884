"""Selection: which entries of the pyramid a layer attends to, in both directions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lighthouse.geometry import Geometry


@dataclass(frozen=True)
class Selection:
    """The gathered entries of one layer, as the inverse map from entries to rows. Carries no gradient.

    With the inverse map both directions of gather and of scatter are gathers: no atomics, and every element is
    written once.
    """

    geometry: Geometry
    places: Tensor
    """[B, G, pyramid length] int32: the row in 0..S-1 that each entry has, or -1 if it is not gathered. Entries are
    numbered in the concatenated pyramid, level 0 first."""

    @property
    def rows(self) -> tuple[Tensor, ...]:
        """Views of `places`, one a level: [B, G, N/p^l]."""
        return self.places.split([self.geometry.entries(level) for level in range(self.geometry.levels)], -1)

    @property
    def indices(self) -> Tensor:
        """[B, G, S] int64: the entries in causal order. Made anew at each call: no step needs it."""
        places, length = self.places.long(), self.geometry.gathered_length
        entry = torch.arange(places.shape[-1], device=places.device).expand_as(places)
        # entries that are not gathered are written to one slot behind the end, which is cut off
        indices = places.new_empty(*places.shape[:2], length + 1)
        return indices.scatter_(-1, places.where(places >= 0, length), entry)[..., :length].contiguous()
