"""What the layers of an attention record of themselves, in Megatron's logs, every so many iterations; a picture at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_lighthouse.lighthouse.geometry import Shape
from megatron_lighthouse.mcore.loop import switch
from megatron_lighthouse.running import Telemetry


@dataclass(frozen=True)
class Logged:
    """What is logged, when, and of which layers."""

    telemetry: Telemetry
    interval: int
    layers: tuple[int, ...]
    shape: Shape
    """Of a layer's inputs, of all tensor-parallel ranks."""
    folder: str | None
    """For the picture; None: there is none."""
    latest: dict[int, dict[str, float]] = field(default_factory=dict)
    """What was logged last, by its iteration, where this rank has a writer."""

    def train_step(self, step: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """Around Megatron's."""
        now = switch.iteration()
        if now % self.interval:
            return step(*given, **named)
        with self.telemetry.watching(self.layers):
            answer = step(*given, **named)
            self.log(now)
        return answer

    def log(self, iteration: int) -> None:
        """Log the `scalars` of an iteration, where this rank has a writer. Every rank calls it."""
        from megatron.training import get_tensorboard_writer, get_wandb_writer

        scalars = self.scalars()
        if writer := get_tensorboard_writer():
            for name, value in scalars.items():
                writer.add_scalar(name, value, iteration)
            self.latest.clear()
            self.latest[iteration] = scalars
        if wandb := get_wandb_writer():
            wandb.log(scalars, iteration)

    def scalars(self) -> dict[str, float]:
        """Of all ranks, the same on each. Every rank calls it."""
        from megatron.core import mpu

        here = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        place = mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()
        sums = self.telemetry.sums(self.layers, self.shape, *place).to(here)
        torch.distributed.all_reduce(sums)
        return self.telemetry.scalars(self.layers, sums.cpu())

    def train(self, train: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """Around Megatron's, which leaves at --exit-interval by SystemExit: what was logged last is drawn."""
        try:
            return train(*given, **named)
        finally:
            for iteration, scalars in self.latest.items():
                self.draw(iteration, scalars)

    def draw(self, iteration: int, scalars: dict[str, float]) -> None:
        """A picture is not worth the exit status of a run that is done: why there is none is said."""
        if self.folder is None:
            return
        try:
            self.telemetry.draw(scalars, Path(self.folder), iteration)
        except Exception as error:
            print(f"telemetry could not be drawn in {self.folder}: {type(error).__name__}: {error}")
