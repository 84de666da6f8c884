"""What a backend of the inner attention must be able to take."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_lighthouse.gpu import capability_of

SHARDS, DOCUMENTS, SINKS, WINDOWS = "over shards ", "over documents ", "with sinks ", "with a window "
"""What is attended over, in words; with nothing to add, whole sequences."""


@dataclass(frozen=True)
class RowKind:
    """Kinds of rows: all that a choice among backends goes by."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    groups: int
    dim: int
    """Of queries and keys."""
    value_dim: int

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
