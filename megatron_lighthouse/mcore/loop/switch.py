"""The schedule's switches in Megatron's training loop: the iteration it is in, a checkpoint and a line in the log at each.

The layers themselves ask `iteration()` in every call, so that nothing of the schedule is kept anywhere but in the checkpoint's
iteration: a job that is started again goes on in the right stage, and all ranks switch in the same iteration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_lighthouse.lighthouse.config import flag
from megatron_lighthouse.mcore.command_line.settings import LighthouseSettings
from megatron_lighthouse.mcore.command_line.stage import SWITCHES
from megatron_lighthouse.notice import say_once

SCALAR = "lighthouse/layers"
"""In TensorBoard: the layers that use Lighthouse, by iteration."""


def iteration() -> int:
    """The training iteration that is running, from 1; in an evaluation, the last one before it.

    Raises:
        ValueError: where no training loop of Megatron counts.
    """
    try:
        from megatron.training import get_args

        args = get_args()
    except (ImportError, AssertionError):
        raise ValueError(
            f"{' and '.join(map(flag, SWITCHES))} go by the iterations that Megatron's training loop counts, and there is "
            "none: leave them out."
        ) from None
    # Megatron counts those that are done; what it has not trained in this process it knows from the checkpoint alone
    running = 0 if args.skip_train else args.curr_iteration + 1
    return max(running, args.iteration)


class Switch:
    """Follows the training loop, by the settings of a run's layers."""

    def __init__(self, settings: LighthouseSettings) -> None:
        self.settings, self.dense = settings, 0

    def train_step(self, step: Callable[..., Any], forward: Any, data: Any, model: Any, *rest: Any, **named: Any) -> Any:
        """Around Megatron's: says which layers are dense, and has graphs of other layers captured again."""
        before, self.dense = self.dense, _tell(self.settings, self.dense)
        if self.dense != before:
            from megatron_lighthouse.mcore.loop import captured  # which imports Megatron

            captured.forget(model)
        return step(forward, data, model, *rest, **named)

    def checkpoint_and_decide_exit(
        self, decide: Callable[..., Any], model: Any, optimizer: Any, scheduler: Any, iteration: int, *rest: Any, **named: Any
    ) -> Any:
        """Around Megatron's: a checkpoint of the last iteration before a switch."""
        from megatron.training import get_args

        args = get_args()
        interval = args.save_interval
        if self._is_last_before(iteration):
            args.save_interval = iteration  # so that Megatron saves as it always does, and no more than once
        try:
            return decide(model, optimizer, scheduler, iteration, *rest, **named)
        finally:
            args.save_interval = interval

    def delete_checkpoint(self, delete: Callable[..., Any], folder: str, iteration: int, *rest: Any, **named: Any) -> None:
        """Around Megatron's: --save-retain-interval keeps that checkpoint."""
        if not self._is_last_before(iteration):
            delete(folder, iteration, *rest, **named)

    def _is_last_before(self, iteration: int) -> bool:
        return self.settings.schedule is not None and iteration in self.settings.schedule.changes.values()


def _tell(settings: LighthouseSettings, before: int) -> int:
    """Before an iteration: a line where other than `before` layers are dense, and the scalar. Answers how many are."""
    from megatron.training import get_args, get_tensorboard_writer

    args, now = get_args(), iteration()
    layers, dense = settings.lighthouse_layers(args.num_layers), settings.dense_by_now(args.num_layers, now)
    if settings.schedule and dense != before:
        say_once(f"iteration {now}: {dense} of {layers} Lighthouse layers are dense ({settings.schedule.because(now)})")
    writer = get_tensorboard_writer()
    if writer and now % args.tensorboard_log_interval == 0:
        writer.add_scalar(SCALAR, layers - dense, now)
    return dense
