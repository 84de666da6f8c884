"""What `check` asks of a run that is started again and again: whether it goes on from its checkpoint. Imports no Megatron."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from megatron_lighthouse.mcore.command_line.resume import problems as resume_problems
from megatron_lighthouse.mcore.command_line.stored import TRACKER

AT_EVERY_START = {
    "finetune": (
        "--finetune would begin at iteration 0 at every start, a requeued job's too",
        "leave it out (--pretrained-checkpoint FOLDER does so once)",
    ),
    "no_load_optim": (
        "--no-load-optim would drop the optimizer's moments and begin the schedule anew at every start, a requeued job's too",
        "leave it out (--pretrained-checkpoint FOLDER loads weights alone, once)",
    ),
    "no_save_optim": ("--no-save-optim leaves a requeued job nothing to go on from", "leave it out"),
    "ckpt_step": (
        "--ckpt-step {} would go back there at every start, a requeued job's too",
        f"write {{}} into {TRACKER} of the run's checkpoints instead",
    ),
    "override_ckpt_iteration": (
        "--override-ckpt-iteration {} would go back there at every start, a requeued job's too",
        "leave it out",
    ),
}


def problems(args: argparse.Namespace, folder: Path | None, base: Path | None = None) -> Iterator[str]:
    """Why a run that saves and loads in one folder would not go on from its last checkpoint.

    Args:
        folder: --load, where this machine has it; base: --pretrained-checkpoint.
    """
    if args.load is not None and args.save == args.load and not args.skip_train:
        for name, (what, use) in AT_EVERY_START.items():
            if value := getattr(args, name):
                yield f"{what}: {use}.".format(value, value)
    yield from resume_problems(args, folder, base)
