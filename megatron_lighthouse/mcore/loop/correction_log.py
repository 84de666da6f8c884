"""What the layers of Parallax subtract, in Megatron's logs, every so many iterations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megatron_lighthouse.mcore.loop import switch
from megatron_lighthouse.parallax import telemetry


@dataclass(frozen=True)
class Logged:
    """When it is logged, and of which layers."""

    interval: int
    layers: tuple[int, ...]

    def train_step(self, step: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """Around Megatron's."""
        now = switch.iteration()
        if now % self.interval:
            return step(*given, **named)
        with telemetry.watching(self.layers):
            answer = step(*given, **named)
            self.log(now)
        return answer

    def log(self, iteration: int) -> None:
        """Log the `corrections` of an iteration's last micro-batch, where this rank has a writer. Every rank calls it."""
        from megatron.training import get_tensorboard_writer, get_wandb_writer

        scalars = {f"parallax/correction/layer-{layer}": value for layer, value in self.corrections().items()}
        if writer := get_tensorboard_writer():
            for name, value in scalars.items():
                writer.add_scalar(name, value, iteration)
        if wandb := get_wandb_writer():
            wandb.log(scalars, iteration)

    def corrections(self) -> dict[int, float]:
        """By layer: the norm of what is subtracted over that of the softmax average, of all tokens and heads."""
        here = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        watched, none = telemetry.watched(), torch.zeros(2, dtype=torch.float64, device=here)
        sums = torch.stack([watched.get(layer, none) for layer in self.layers])
        torch.distributed.all_reduce(sums)
        return {
            layer: (covariance / value) ** 0.5
            for layer, (covariance, value) in zip(self.layers, sums.tolist(), strict=True)
            if value
        }
