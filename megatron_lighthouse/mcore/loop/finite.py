"""Losses, gradients and weights that are not finite: they are found before the optimizer's step, and never saved.

Megatron reruns an iteration whose loss or gradient is not finite. Where that repeats it asks for another GPU, by the state that
it saves: a run that meets the same again could not go on from that checkpoint. Here it ends, with plain weights saved.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from megatron.core.rerun_state_machine import RerunMode, RerunState, get_rerun_state_machine
from megatron.training import get_args
from megatron.training import training as loop
from torch.distributed.tensor import DTensor

from megatron_lighthouse.mcore.command_line.stored import TRACKER
from megatron_lighthouse.notice import say_once

NOT_FINITE = 16
"""Exit status, as Megatron's, of a run that would meet the same again: pretrain.sbatch does not queue it."""
WATCHED = "lighthouse_watched"
"""Of Megatron's machine of reruns: that it is as `_from_the_first` makes it."""

LOSS = "the loss of this rank is not finite"

type Step = Callable[..., Any]


def train_step(step: Step, forward: Any, data: Any, model: Any, *rest: Any, iteration: int, **named: Any) -> Any:
    """Around Megatron's: an iteration that would be met again ends the run."""
    machine = get_rerun_state_machine()
    if not hasattr(machine, WATCHED):
        _from_the_first(machine)
    losses, skipped, saves, ends, status, *others = step(forward, data, model, *rest, iteration=iteration, **named)
    if ends and status == NOT_FINITE:
        machine.state = RerunState.NOT_RUNNING_YET  # so that a checkpoint holds no iteration to repeat
        saves = _end(get_args(), iteration, weights_are_finite(model))
    return (losses, skipped, saves, ends, status, *others)


def whole_iteration(call: Step, graph: Any, *rest: Any, **named: Any) -> Any:
    """Around Megatron's graph of an iteration or evaluation, within which nothing is checked: losses are, after each replay."""
    results = call(graph, *rest, **named)
    for losses in results:
        get_rerun_state_machine().validate_result(
            result=losses["lm loss"][0],
            rejection_func=lambda value: ~torch.isfinite(value),
            message=LOSS,
            tolerance=0.0,
            fatal=True,
        )
    return results


def checks(args: Namespace) -> bool:
    """Whether losses are: Megatron wants its own check off where it captures whole iterations."""
    return bool(args.check_for_nan_in_loss_and_grad) or args.cuda_graph_impl == "full_iteration"


def save_checkpoint(save: Step, iteration: int, model: Any, *rest: Any, **named: Any) -> Any:
    """Around Megatron's: weights that are not finite are not saved."""
    if not weights_are_finite(model):
        _end(get_args(), iteration, finite=False)
        loop.maybe_finalize_async_save(blocking=True, terminate=True)
        raise SystemExit(NOT_FINITE)
    return save(iteration, model, *rest, **named)


def weights_are_finite(model: Iterable[torch.nn.Module]) -> bool:
    """Whether all weights of all ranks are. Every rank calls it, and gets the same answer.

    Args:
        model: this rank's chunks of the model.
    """
    here = [weight.to_local() if isinstance(weight, DTensor) else weight for chunk in model for weight in chunk.parameters()]
    return not _any_rank(not all(torch.isfinite(weight.detach()).all() for weight in here))


def _any_rank(here: bool) -> bool:
    flag = torch.tensor(float(here), device="cuda")
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag.item())


def _from_the_first(machine: Any) -> None:
    """Check a process's first iteration too, and a loaded one as any other."""
    setattr(machine, WATCHED, True)
    machine.first_iteration_complete = True
    if machine.state == RerunState.WILL_RERUN_FROM_CHECKPOINT:  # saved so by a run of Megatron's own
        machine.state, machine.data_iterator_checkpoints = RerunState.NOT_RUNNING_YET, None
    if machine.mode == RerunMode.DISABLED:
        _end_together(machine)


def _end_together(machine: Any) -> None:
    """With --rerun-mode disabled, where Megatron would raise on the one rank that finds it."""
    validate, found = machine.validate_result, False

    def validate_result(result: Any, rejection_func: Callable[[Any], Any], message: str, **named: Any) -> None:
        nonlocal found
        if not named.get("fatal", True):
            validate(result, rejection_func, message, **named)
        elif rejection_func(result):
            found = True
            print(f"lighthouse: rank {torch.distributed.get_rank()}: {message}: {result}", flush=True)

    def should_checkpoint_and_exit() -> tuple[bool, bool, int]:
        ends = checks(get_args()) and _any_rank(found)
        return ends, ends, NOT_FINITE if ends else 0

    machine.validate_result, machine.should_checkpoint_and_exit = validate_result, should_checkpoint_and_exit


def _end(args: Namespace, done: int, finite: bool) -> bool:
    """Say what is wrong after `done` iterations, and from where to go on. Answers whether the weights are to be saved."""
    loop.maybe_finalize_async_save(blocking=True)
    what = f"the loss or a gradient of iteration {done + 1} is not finite, and its step is not taken"
    if finite and args.save and done > max(args.iteration, _latest(args.save)):
        say_once(f"{what}: the weights before it are saved as iteration {done} in {args.save}, the last good checkpoint.")
        return True
    folder = args.save if _latest(args.save) else args.load
    good = f"the last good checkpoint is iteration {_latest(folder)} in {folder}"
    if not finite:
        what = f"weights of iteration {done} are not finite, and are not saved"
        if args.load and done == args.iteration:
            loaded = args.ckpt_step or _latest(args.load)
            earlier = " ".join(str(number) for number in _iterations(args.load) if number < loaded) or "none is left"
            good = f"so they were loaded from {args.load}; start from an earlier one by --ckpt-step: {earlier}"
    say_once(f"{what}: {good if _latest(folder) else 'there is no checkpoint to go on from'}.")
    return False


def _latest(folder: str | None) -> int:
    """The iteration that a start from `folder` loads; 0 where there is none."""
    try:
        return int(Path(folder, TRACKER).read_text()) if folder else 0
    except (OSError, ValueError):
        return 0


def _iterations(folder: str) -> list[int]:
    return sorted(int(path.name[5:]) for path in Path(folder).glob("iter_*") if path.name[5:].isdigit())
