"""Gates of logits: natural logarithms <= 0, in the dtype of sums. What is kept for backward is the logits alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class LogSigmoid:
    """g = logsigmoid(logit); with a bound m, m expm1(g / m), which lies above -m (Tilde's release)."""

    most: float = 0.0
    """m; 0: none."""

    def __call__(self, logits: Tensor) -> Tensor:
        gates: Tensor = _LogSigmoid.apply(logits, self.most)
        return gates


class _LogSigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, most: float) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.most = most
        gates = logsigmoid(_wide(logits))
        return most * torch.expm1(gates / most) if most else gates

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        wide = _wide(logits)
        slope = torch.sigmoid(-wide)
        if ctx.most:
            slope *= (logsigmoid(wide) / ctx.most).exp()
        return (grad * slope).to(logits.dtype), None


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
