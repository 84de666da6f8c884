"""Alone: a block over whole sequences, on one rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_lighthouse.context_parallel.parts import Block, Mask, Tensors, saved_in, sinks_gradient
from megatron_lighthouse.once import once_differentiable

WHOLE = Mask((0,), (0,))
"""Near rows see far ones up to their own, and the last of both is the same row."""


@dataclass(frozen=True, eq=False)  # as softmax.variant.Rows
class Alone:
    """Attention without shards: see `Scheme`."""

    block: Block

    def __call__(self, near: Tensors, far: Tensors, sinks: Tensor | None = None) -> Tensor:
        out: Tensor = _Alone.apply(self.block, sinks, len(near), *near, *far)
        return out


class _Alone(torch.autograd.Function):
    """(block, sinks or None, number of near tensors, *near, *far) -> output."""

    @staticmethod
    def forward(ctx: Any, block: Block, sinks: Tensor | None, count: int, *rows: Tensor) -> Tensor:
        near, far = rows[:count], rows[count:]
        part = block.forward(near, far, WHOLE).with_sinks(sinks)
        ctx.block, ctx.near, ctx.far = block, len(near), len(far)
        ctx.save_for_backward(*near, *far, *part.averages, part.lse, sinks)
        return block.output(part)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *saved, sinks = ctx.saved_tensors
        near, far, part = saved_in(saved, ctx.near, ctx.far)
        d_near, d_far = ctx.block.backward(grad, near, far, part, WHOLE)
        d_sinks = sinks_gradient(sinks, grad, ctx.block.output(part), part.lse)
        return None, d_sinks, None, *d_near, *d_far
