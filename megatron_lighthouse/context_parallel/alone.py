"""Alone: a block over whole sequences, on one rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_lighthouse.context_parallel.parts import Block, Mask, Part, Tensors

WHOLE = Mask((0,), (0,))


@dataclass(frozen=True)
class Alone:
    """Attention without shards: see `Scheme`."""

    block: Block

    def __call__(self, near: Tensors, far: Tensors) -> Tensor:
        out: Tensor = _Alone.apply(self.block, len(near), *near, *far)
        return out


class _Alone(torch.autograd.Function):
    """(block, number of near tensors, *near, *far) -> output."""

    @staticmethod
    def forward(ctx: Any, block: Block, count: int, *rows: Tensor) -> Tensor:
        near, far = rows[:count], rows[count:]
        part = block.forward(near, far, WHOLE)
        ctx.block, ctx.near, ctx.far = block, len(near), len(far)
        ctx.save_for_backward(*near, *far, *part.averages, part.lse)
        return block.output(part)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        near, far = saved[: ctx.near], saved[ctx.near : ctx.near + ctx.far]
        d_near, d_far = ctx.block.backward(grad, near, far, Part(saved[ctx.near + ctx.far : -1], saved[-1]), WHOLE)
        return None, None, *d_near, *d_far
