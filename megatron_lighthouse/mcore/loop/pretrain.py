"""The training run: Megatron's `pretrain` loop with the attention that `--attention` names."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from pathlib import Path

import torch
from megatron.core import mpu
from megatron.core.enums import ModelType
from megatron.training import pretrain, set_startup_timestamps
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from torch.distributed.checkpoint.api import CheckpointException

from megatron_lighthouse.launch import start
from megatron_lighthouse.lighthouse import telemetry
from megatron_lighthouse.mcore.command_line import before, graphs, ignored, kept
from megatron_lighthouse.mcore.command_line.entry import LAYER, add_arguments, checked_model, with_all_arguments
from megatron_lighthouse.mcore.data.datasets import train_valid_test_datasets
from megatron_lighthouse.mcore.loop import captured, hooks, selection_log
from megatron_lighthouse.mcore.loop.forward_step import forward_step
from megatron_lighthouse.mcore.refusal import REFUSED, repeats, say

__all__ = ["add_arguments", "pictures_of", "run"]


def run(program_start: float | None = None) -> None:
    """Parse the command line, check it, and train.

    Raises:
        SystemExit: with REFUSED, before the process group exists, where Lighthouse or Megatron refuses the command line, or the
            data that it names cannot be read.
    """
    set_startup_timestamps(program_start=program_start, main_entry=time.time())
    hooks.adapt_machine()
    try:
        words = sys.argv[1:] = kept.resumed(sys.argv[1:])
        if (given := before.given(sys.argv[1:])) and given.yaml_cfg is None:
            ranks, whole = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "0") == "0"
            start.check(words, ranks, torch.cuda.is_available(), whole)
            ignored.say(given)
            sys.argv[1:] = [*words, *graphs.taken(given, torch.cuda.is_available())]
        args = parse_and_validate_args(extra_args_provider=with_all_arguments)
        model_cfg = checked_model(args)
        pictures = pictures_of(args)
        for layer_number in pictures:
            telemetry.watch(layer_number)
        kept.keep(args, words)
        hooks.follow_training()
        container = pretrain_cfg_container_from_args(args, model_cfg)
    except Exception as error:
        if not repeats(error, parsed=False):
            raise
        say(error)
        raise SystemExit(REFUSED) from error
    try:
        pretrain(container, train_valid_test_datasets, ModelType.encoder_or_decoder, forward_step)
    except SystemExit as stop:  # with 0, how Megatron ends at --exit-interval, at a time limit and on SIGTERM
        if stop.code != 0:  # with none, how it ends where a checkpoint cannot be read: that is a failure
            raise SystemExit(stop.code or 1) from stop
    except (Exception, CheckpointException) as error:  # torch's is no Exception
        traceback.print_exc()
        sys.stdout.flush()
        trains = hasattr(args, "curr_iteration")  # Megatron sets it in the loop, where another start may well get further
        os._exit(
            REFUSED if not trains and repeats(error, parsed=True) else 1
        )  # data loaders and the checkpoint's writer would keep a rank that failed, and so the job, alive
    for layer_number, path in pictures.items():
        _draw_selection(layer_number, path)
    if pictures:
        _say_what_is_not_drawn(pictures)
    captured.end()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def pictures_of(args: argparse.Namespace) -> dict[int, Path]:
    """Where the selection of which layers is drawn: of all that are watched if the name tells them apart, else of the first."""
    name = args.lighthouse_selection_map
    if not name:
        return {}
    layers = selection_log.watched_layers(args)
    return {n: Path(name.replace(LAYER, str(n))) for n in (layers if LAYER in name else layers[:1])}


def _draw_selection(layer_number: int, path: Path) -> None:
    """By the first of the ranks that share the first sequence, which all put together what they selected."""
    choice = telemetry.watched().get(layer_number)
    if choice is None or mpu.get_data_parallel_rank():
        return
    selection, size = selection_log.whole(choice).selection, mpu.get_context_parallel_world_size()
    if not mpu.get_tensor_model_parallel_rank() and not mpu.get_context_parallel_rank():
        from megatron_lighthouse import plots

        ranks = f", context parallel {size}" if size > 1 else ""
        try:
            plots.selection_map(selection, path, f"layer {layer_number}{ranks}")
        except Exception as error:  # the training is done: a picture is not worth its exit status, nor other ranks' waiting
            print(f"lighthouse: --lighthouse-selection-map {path} could not be drawn: {type(error).__name__}: {error}")


def _say_what_is_not_drawn(pictures: dict[int, Path]) -> None:
    """Of layers that selected nothing in this job, as after the switch. Every rank calls it."""
    selected = torch.tensor([float(telemetry.watched().get(n) is not None) for n in pictures]).cuda()
    torch.distributed.all_reduce(selected)
    for (layer_number, path), ranks in zip(pictures.items(), selected.tolist(), strict=True):
        if not ranks and not torch.distributed.get_rank():
            what = "stays as an earlier job drew it" if path.is_file() else "is not drawn"
            print(f"lighthouse: --lighthouse-selection-map {path} {what}: layer {layer_number} selected nothing here.")
