"""What `check` asks of a run's numbers and options: all that the run refuses without Megatron. Imports no Megatron."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from megatron_lighthouse.mcore.command_line import before, run_options
from megatron_lighthouse.mcore.command_line.arguments import attention_problems, config_of

ELSEWHERE = {
    "job": f"({sys.executable} is taken for the job's Python. Where a container has these packages, name it by IMAGE in the "
    "cluster file; another Python by PYTHON. With CHECK_PYTHON the job's pre-flight looks for them.)",
    "now": f"({sys.executable} trains here. Name another Python that has these packages by PYTHON.)",
}
"""What else than to install a package, where a job is checked, and where this machine trains."""
SPEC = ["megatron_lighthouse.mcore.spec", "lighthouse"]


def sizes(args: argparse.Namespace, runs_here: str | None = None, gpus: bool = False) -> Iterator[str]:
    """Iterations, and what the run refuses of its options, its model and its attention.

    Args:
        runs_here: whether what this Python lacks a package for is refused too: a job's, or now.
        gpus: whether the ranks have GPUs.
    """
    if args.train_samples is not None:
        iterations = args.train_samples // args.global_batch_size if args.global_batch_size else "N"
        yield (
            f"--train-samples {args.train_samples} names no iteration at which a job is done, which these scripts count: "
            f"use --train-iters {iterations} alone."
        )
    elif not args.train_iters:
        given = "is missing" if args.train_iters is None else f"{args.train_iters} trains nothing"
        yield f"--train-iters {given}: give the iterations at which the job is done, such as --train-iters 20000."
    if runs_here and (found := [*run_options.missing_packages(args, gpus)]):
        yield from found
        yield ELSEWHERE[runs_here]
    if runs_here and not gpus:
        yield from run_options.without_gpus(args)
    yield from of_run(args)


def of_run(args: argparse.Namespace) -> Iterator[str]:
    """What the run refuses of its options, its model and its attention, packages apart."""
    known = args.num_layers and args.num_attention_heads and args.seq_length and not args.use_checkpoint_args
    own = [*attention_problems(args, config_of(args), args.spec == SPEC, args.spec is not None)] if known else []
    # what the attention offers of a length, other rules take too
    length = f"--seq-length {args.seq_length} "
    spoken = any(problem.startswith(length) for problem in own)
    yield from (problem for problem in before.problems(args) if not (spoken and problem.startswith(length)))
    yield from run_options.problems(args, not args.use_checkpoint_args)
    yield from own
