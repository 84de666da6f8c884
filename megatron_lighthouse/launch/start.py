"""What the run itself refuses before its ranks meet: all that tells without Megatron, at once. Imports no Megatron."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_lighthouse.launch.check import read
from megatron_lighthouse.launch.layout import layout
from megatron_lighthouse.launch.sizes import of_run
from megatron_lighthouse.mcore.command_line import flags, places
from megatron_lighthouse.mcore.command_line.run_options import missing_packages, without_gpus
from megatron_lighthouse.mcore.data import files


def check(words: Sequence[str], ranks: int, gpus: bool, whole: bool) -> None:
    """Refuse a command line, as this rank sees its folders and its data.

    Args:
        ranks: of the run; gpus: whether they have GPUs.
        whole: whether great indices are read to their end: others than the first rank need not.

    Raises:
        ValueError: all that is wrong, a sentence a line.
    """
    if found := problems(words, ranks, gpus, whole):
        raise ValueError("\n".join(found))


def problems(words: Sequence[str], ranks: int, gpus: bool, whole: bool = True) -> list[str]:
    """What `check` refuses, each in a sentence."""
    args, wrong, *_ = read(words, Path)
    args.world_size = ranks
    found = [*([] if gpus else without_gpus(args)), *of_run(args), *missing_packages(args, gpus)]
    found += [*places.problems(args, Path), *files.problems(args, Path, whole)]
    if not args.use_mp_args_from_checkpoint_args:  # else the sizes are the checkpoint's
        found = [*layout(args, 1, ranks, "--nproc-per-node"), *found]
    return [*dict.fromkeys([*wrong, *flags.apart(found, args.malformed)])]
