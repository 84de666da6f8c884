"""What tiles of the sequence ask of autograd: one is made again in backward, and gradients of weights are summed over all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_lighthouse.sums import accumulation_dtype


def apart(of_tile: Callable[..., Any], *given: Any) -> Any:
    """`of_tile(*given)`, which draws no random numbers; of what it computes nothing is kept, and backward computes it again."""
    return checkpoint(of_tile, *given, use_reentrant=False, preserve_rng_state=False, determinism_check="none")


class Summed:
    """A weight whose gradients are summed in fp32 over its uses, and rounded once, at the last.

    Where they are added to Megatron's `main_grad` by the product itself, there is nothing to sum.
    """

    def __init__(self, weight: Tensor, uses: int, fused: bool) -> None:
        self.weight, self.uses = weight, uses
        self.sums = weight.requires_grad and torch.is_grad_enabled() and not fused and uses > 1
        self.total: Tensor | None = None
        self.left = uses

    def use(self) -> Tensor:
        """The weight, for one use."""
        return _Use.apply(self.weight, self) if self.sums else self.weight

    def add(self, grad: Tensor) -> Tensor | None:
        """The sum, in the weight's dtype, when the last use has come."""
        self.total = grad.to(accumulation_dtype(grad)) if self.total is None else self.total.add_(grad)
        self.left -= 1
        if self.left:
            return None
        total, self.total, self.left = self.total, None, self.uses
        return total.to(grad.dtype)


class _Use(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, summed: Summed) -> Tensor:
        ctx.summed = summed
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        return ctx.summed.add(grads[0]), None
