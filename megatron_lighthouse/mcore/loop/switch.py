"""The switch to stage 2 in Megatron's training loop: the iteration it is in, its checkpoint, its line in the log.

The layers themselves ask `iteration()` in every call, so that nothing of stage 2 is kept anywhere but in the checkpoint's
iteration: a job that is started again goes on in the right stage, and all ranks switch in the same iteration.
"""

from __future__ import annotations

from functools import cache, wraps
from typing import Any

from megatron_lighthouse.lighthouse.config import flag
from megatron_lighthouse.mcore.command_line.settings import LighthouseSettings
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
            f"{flag('stage2_at')} goes by the iterations that Megatron's training loop counts, and there is none: leave it out."
        ) from None
    # Megatron counts those that are done; what it has not trained in this process it knows from the checkpoint alone
    running = 0 if args.skip_train else args.curr_iteration + 1
    return max(running, args.iteration)


@cache
def install(settings: LighthouseSettings) -> None:
    """Follow this process's training loop. Once for equal settings, however many parts of a model ask; on every rank."""
    from megatron.training import checkpointing, get_args
    from megatron.training import training as loop

    step, decide, stage2, dense = loop.train_step, loop.checkpoint_and_decide_exit, settings.stage2, 0

    @wraps(step)
    def train_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal dense
        dense = _tell(settings, dense)
        return step(*args, **kwargs)

    @wraps(decide)
    def checkpoint_and_decide_exit(
        model: Any, optimizer: Any, scheduler: Any, iteration: int, *rest: Any, **kwargs: Any
    ) -> Any:
        args = get_args()
        interval = args.save_interval
        if stage2 is not None and iteration == stage2.at:
            args.save_interval = iteration  # so that Megatron saves as it always does, and no more than once
        try:
            return decide(model, optimizer, scheduler, iteration, *rest, **kwargs)
        finally:
            args.save_interval = interval

    delete = checkpointing._async_delete_checkpoint_impl

    @wraps(delete)
    def delete_but_the_switch(folder: str, iteration: int, *rest: Any, **kwargs: Any) -> None:
        if stage2 is None or iteration != stage2.at:  # --save-retain-interval would
            delete(folder, iteration, *rest, **kwargs)

    loop.train_step, loop.checkpoint_and_decide_exit = train_step, checkpoint_and_decide_exit
    checkpointing._async_delete_checkpoint_impl = delete_but_the_switch


def _tell(settings: LighthouseSettings, before: int) -> int:
    """Before an iteration: a line where other than `before` layers are dense, and the scalar. Answers how many are."""
    from megatron.training import get_args, get_tensorboard_writer

    args, now = get_args(), iteration()
    layers, dense = settings.lighthouse_layers(args.num_layers), settings.dense_by_now(args.num_layers, now)
    if settings.stage2 and dense != before:
        say_once(f"iteration {now}: {dense} of {layers} Lighthouse layers are dense ({flag('stage2_at')} {settings.stage2.at})")
    writer = get_tensorboard_writer()
    if writer and now % args.tensorboard_log_interval == 0:
        writer.add_scalar(SCALAR, layers - dense, now)
    return dense
