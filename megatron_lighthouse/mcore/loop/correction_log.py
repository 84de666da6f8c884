"""What the layers of Parallax subtract, in Megatron's logs, every so many iterations."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megatron_lighthouse.mcore.loop import switch
from megatron_lighthouse.parallax import telemetry
from megatron_lighthouse.parallax.config import INTERVAL, ParallaxConfig


def check(args: argparse.Namespace, config: ParallaxConfig) -> None:
    """Raises ValueError: what cannot be as asked, with what would work."""
    if not config.telemetry_interval:
        return
    if not args.tensorboard_dir and not getattr(args, "wandb_project", None):
        raise ValueError(
            f"{INTERVAL} {config.telemetry_interval} has nowhere to log to: add --tensorboard-dir DIR or --wandb-project NAME."
        )
    if (graphs := getattr(args, "cuda_graph_impl", "none")) != "none":
        raise ValueError(
            f"{INTERVAL} {config.telemetry_interval} cannot look into the graphs of --cuda-graph-impl {graphs}: leave one of "
            "them out."
        )


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
