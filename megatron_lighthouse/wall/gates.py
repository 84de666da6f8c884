"""Gates of logits: natural logarithms <= 0, in the dtype of sums. What is kept for backward is the logits alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_lighthouse.lighthouse.rotary import Rotary
from megatron_lighthouse.once import once_differentiable
from megatron_lighthouse.sums import accumulation_dtype
from megatron_lighthouse.wall.config import WallConfig


@dataclass(frozen=True)
class LogSigmoid:
    """g = logsigmoid(logit); with a bound m, m expm1(g / m), which lies above -m (Tilde's release)."""

    most: float = 0.0
    """m; 0: none."""

    def __call__(self, logits: Tensor) -> Tensor:
        gates: Tensor = _LogSigmoid.apply(logits, self.most)
        return gates


@dataclass(frozen=True)
class Paired:
    """One gate for two channels that RoPE turns together: [..., K/2] -> [..., K].

    A rotation by positions commutes with a gate that is the same in both channels of a pair, so that rotated queries and keys
    give the logits of relative positions, faded. Ours.
    """

    gates: Callable[[Tensor], Tensor]
    rotary: Rotary | None
    """Which pairs: those that it turns, and likewise those of the channels behind them. None: of halves, for nothing turns."""

    def __call__(self, logits: Tensor) -> Tensor:
        gates = self.gates(logits)
        if self.rotary is not None and self.rotary.interleaved:
            return gates.repeat_interleave(2, -1)
        turned = gates.shape[-1] if self.rotary is None else self.rotary.pairs
        first, rest = gates[..., :turned], gates[..., turned:]
        return torch.cat([first, first, rest, rest], -1)


def of_channels(config: WallConfig, rotary: Rotary | None) -> Callable[[Tensor], Tensor]:
    """What makes gates [..., K] of what linear_g gives."""
    gates = LogSigmoid(config.gate_max)
    return Paired(gates, rotary) if config.paired_gates else gates


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
    return x.to(accumulation_dtype(x))
