"""The training run: Megatron's `pretrain` loop with the attention that `--attention` names."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import torch
from megatron.core import mpu
from megatron.core.enums import ModelType
from megatron.training import initialize, pretrain, print_rank_0, set_startup_timestamps
from megatron.training import training as megatron_training
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args

from megatron_lighthouse import telemetry
from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.mcore import progress, text
from megatron_lighthouse.mcore.arguments import use_attention, with_lighthouse_arguments
from megatron_lighthouse.mcore.data import train_valid_test_datasets
from megatron_lighthouse.mcore.run_options import check_run_options
from megatron_lighthouse.mcore.step import forward_step


def run(program_start: float | None = None) -> None:
    """Parse the command line, check it, and train.

    Raises:
        ValueError: what Lighthouse refuses, before the process group exists.
    """
    set_startup_timestamps(program_start=program_start, main_entry=time.time())
    _adapt_to_this_machine()
    args = parse_and_validate_args(extra_args_provider=with_lighthouse_arguments(_add_arguments))
    check_run_options(args)
    model_cfg = use_attention(args, gpt_config_from_args(args))
    watched = args.lighthouse_dense_first + 1
    if args.lighthouse_selection_map:
        telemetry.watch(watched)
    progress.install()
    container = pretrain_cfg_container_from_args(args, model_cfg)
    try:
        pretrain(container, train_valid_test_datasets, ModelType.encoder_or_decoder, forward_step)
    except SystemExit as stop:  # with 0, how Megatron ends at --exit-interval, at a time limit and on SIGTERM
        if stop.code != 0:  # with none, how it ends where a checkpoint cannot be read: that is a failure
            raise SystemExit(stop.code or 1) from stop
    except Exception:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)  # data loaders and the checkpoint's writer would keep a rank that failed, and so the job, alive
    if args.lighthouse_selection_map:
        _draw_selection(watched, Path(args.lighthouse_selection_map))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _draw_selection(layer_number: int, path: Path) -> None:
    """On the one rank that has the layer's first heads and the first data; with the context-parallel ranks of its sequence."""
    selection = telemetry.watched().get(layer_number)
    if selection is None or mpu.get_tensor_model_parallel_rank() or mpu.get_data_parallel_rank():
        return
    exchange = Exchange.over(mpu.get_context_parallel_group())
    selection = telemetry.whole(selection, exchange)
    if exchange is None or exchange.rank == 0:
        from megatron_lighthouse import plots

        ranks = f", context parallel {exchange.size}" if exchange else ""
        plots.selection_map(selection, path, f"layer {layer_number}{ranks}")


def _add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    group = text.add_arguments(parser).add_argument_group("pictures")
    group.add_argument(
        "--lighthouse-selection-map",
        metavar="PNG",
        help="When training ends, draw what the first Lighthouse layer selected in its last batch.",
    )
    _repair_help(parser)
    return parser


def _repair_help(parser: argparse.ArgumentParser) -> None:
    """Escape the per cent signs in Megatron's help texts: 0.19 leaves one bare, and its --help raises ValueError."""
    for action in parser._actions:
        try:
            (action.help or "") % {**vars(action), "prog": parser.prog}
        except (ValueError, TypeError, KeyError):
            action.help = (action.help or "").replace("%", "%%")


def _adapt_to_this_machine() -> None:
    """Two things that Megatron-core's wheel asks of a machine and does not need."""
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
