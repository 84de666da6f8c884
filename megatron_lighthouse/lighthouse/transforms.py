"""Refusals of what has no derivative here: second derivatives, forward-mode derivatives, and transforms of torch.func."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

ONCE = (
    "lighthouse_attention is differentiable once: its backward has no derivative of its own. Leave out the second derivative "
    "(create_graph=True, a gradient penalty, a Hessian), or use dense attention for it."
)


def refuse_transforms(*inputs: Tensor, of: str = "lighthouse_attention") -> None:
    """Raises RuntimeError under a transform of torch.func, and for inputs with a tangent."""
    if torch.compiler.is_compiling():
        return
    if torch._C._functorch.maybe_current_level() is not None:
        raise RuntimeError(
            f"{of} runs under no transform of torch.func (vmap, grad, vjp, jvp, jacrev, functional_call within "
            "them): give a batch as dimension 1 of [N, B, H, D], and take gradients by backward() or torch.autograd.grad."
        )
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        raise RuntimeError(
            f"{of} has no forward-mode derivative (torch.autograd.forward_ad): take gradients by backward() or "
            "torch.autograd.grad."
        )


def differentiable_once(*inputs: Tensor) -> tuple[Tensor, ...]:
    """The same tensors, whose gradients raise RuntimeError when they are differentiated.

    Without this the second derivative would be zero wherever autograd is allowed to find no path (`hvp`, `allow_unused`).
    torch.compile refuses it itself.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not any(x.requires_grad for x in inputs):
        return inputs
    once: tuple[Tensor, ...] = _Once.apply(*inputs, _Path.apply(*inputs))
    return once


class _Path(torch.autograd.Function):
    """An empty tensor that depends on the inputs without keeping them: the path that a second derivative would take."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.count = len(inputs)
        return inputs[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, ...]:
        return (None,) * ctx.count


class _Once(torch.autograd.Function):
    """(*inputs, path) -> the inputs. Where backward makes a graph, gradients go through `_Twice`, which depends on the path."""

    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> tuple[Tensor, ...]:
        *inputs, path = given
        ctx.save_for_backward(path)
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for x in inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            (path,) = ctx.saved_tensors
            grads = tuple(None if grad is None else _Twice.apply(grad, path) for grad in grads)
        return *grads, None


class _Twice(torch.autograd.Function):
    """A gradient as it is; raises when it is differentiated."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, path: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        raise RuntimeError(ONCE)
