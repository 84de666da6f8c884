"""What Megatron-core's wheel asks of a machine, or gets wrong on one, and does not need to."""

from __future__ import annotations

import argparse
from functools import partial

import torch
from megatron.training import initialize, print_rank_0
from megatron.training import training as megatron_training


def adapt() -> None:
    """Before Megatron is initialized: no compiler is needed where the helper is compiled, and no GPU."""
    if _has_dataset_helpers():
        # the wheel ships the compiled helper but not the Makefile that Megatron would run to build it
        initialize._compile_dependencies = _skip_compilation
    if not torch.cuda.is_available():
        megatron_training.initialize_megatron = partial(megatron_training.initialize_megatron, allow_no_cuda=True)


def _has_dataset_helpers() -> bool:
    try:
        from megatron.core.datasets import helpers_cpp  # noqa: F401
    except ImportError:
        return False
    return True


def _skip_compilation() -> None:
    print_rank_0("> the dataset index builder is compiled already")
    torch.distributed.barrier()


def repair_help(parser: argparse.ArgumentParser) -> None:
    """Escape the per cent signs in Megatron's help texts: 0.19 leaves one bare, and its --help raises ValueError."""
    for action in parser._actions:
        try:
            (action.help or "") % {**vars(action), "prog": parser.prog}
        except (ValueError, TypeError, KeyError):
            action.help = (action.help or "").replace("%", "%%")
