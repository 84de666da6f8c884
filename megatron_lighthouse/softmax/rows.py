"""What a backend of the inner attention must be able to take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lighthouse.gpu import capability_of

SHARDS, DOCUMENTS, SINKS, WINDOWS = "over shards ", "over documents ", "with sinks ", "with a window "
"""What is attended over, in words; with nothing to add, whole sequences."""


@dataclass(frozen=True)
class RowKind:
    """What the rows of a tensor-parallel rank are: all that a choice among backends goes by."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    groups: int
    dim: int
    """Of queries and keys."""
    value_dim: int

    @staticmethod
    def of(query: Tensor, key: Tensor, value_dim: int | None = None) -> RowKind:
        """That of queries [·, ·, H, D] and keys [·, ·, G, D], and of values of `value_dim` channels; None: D."""
        heads, dim = query.shape[2:]
        return RowKind(query.device, query.dtype, heads, key.shape[2], dim, value_dim or dim)

    @property
    def capability(self) -> int:
        return capability_of(self.device)

    @property
    def dims(self) -> str:
        """In words."""
        same = self.dim == self.value_dim
        return f"head dimension {self.dim}" if same else f"head dimensions {self.dim} (keys) and {self.value_dim} (values)"

    def __str__(self) -> str:
        values = "" if self.dim == self.value_dim else f" (values {self.value_dim})"
        heads = f"{self.heads} query and {self.groups} key/value heads of {self.dim}{values}"
        return f"{str(self.dtype).removeprefix('torch.')}, {heads}"
