"""The shapes that benchmarks/attention.py times."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lighthouse import LighthouseConfig


@dataclass(frozen=True)
class Case:
    """One shape of the layer."""

    seq_length: int
    budget: int
    levels: int = 3
    pooling: int = 4
    batch: int = 1
    heads: int = 8
    groups: int = 8
    dim: int = 128
    title: str = ""

    @property
    def config(self) -> LighthouseConfig:
        return LighthouseConfig(self.levels, self.pooling, self.budget)

    @property
    def name(self) -> str:
        shape = (
            ""
            if (self.batch, self.heads, self.groups, self.dim) == (1, 8, 8, 128)
            else (f" B={self.batch} H={self.heads} G={self.groups} D={self.dim}")
        )
        return f"N={self.seq_length} L={self.levels} p={self.pooling} k={self.budget}{shape}"

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as Megatron hands them over: v is a slice of a fused projection."""
        q = torch.randn(self.seq_length, self.batch, self.heads, self.dim, device="cuda", dtype=torch.bfloat16)
        k = torch.randn(self.seq_length, self.batch, self.groups, self.dim, device="cuda", dtype=torch.bfloat16)
        fused = torch.randn(self.seq_length, self.batch, self.groups, 3, self.dim, device="cuda", dtype=torch.bfloat16)
        return q.requires_grad_(), k.requires_grad_(), fused[:, :, :, 2].detach().requires_grad_()


LENGTHS = [
    Case(8192, 128), Case(16384, 256), Case(32768, 512), Case(65536, 1024), Case(98304, 1536),
    Case(131072, 1024), Case(262144, 2048), Case(524288, 4096), Case(1048576, 4096, levels=4),
]  # fmt: skip
OTHERS = [
    Case(98304, 1536, levels=3, pooling=2), Case(98304, 1536, levels=4, pooling=2), Case(98304, 1536, levels=5, pooling=2),
    Case(98304, 1536, levels=3, pooling=8), Case(98304, 3072), Case(98304, 6144), Case(491520, 3840),
]  # fmt: skip
SHAPES = [
    Case(16384, 256, batch=4), Case(98304, 1536, batch=4), Case(16384, 256, heads=32), Case(98304, 1536, heads=32),
    Case(16384, 256, dim=64), Case(98304, 1536, dim=64), Case(8192, 128, batch=4, heads=32), Case(98304, 1536, dim=96),
]  # fmt: skip
