"""Every patch of Megatron's training loop. What a hook does stands in the file of its subject, as a plain function.

A function that is wrapped carries a mark with the subjects around it, so that installing twice wraps once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Hashable
from functools import wraps
from typing import Any

import torch
from megatron.core import full_cuda_graph
from megatron.core.models.gpt import gpt_model
from megatron.core.models.hybrid import hybrid_block, hybrid_model
from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer import mlp, multi_token_prediction
from megatron.training import checkpointing, initialize
from megatron.training import training as loop
from megatron.training.models import gpt as gpt_builder

from megatron_lighthouse.lighthouse.geometry import Shape
from megatron_lighthouse.mcore.attention import te_flash
from megatron_lighthouse.mcore.command_line.settings import LighthouseSettings
from megatron_lighthouse.mcore.loop import (
    captured,
    finite,
    further_tokens,
    layer_log,
    loss_weights,
    machine,
    progress,
    rates,
    selection_log,
    skip,
    switch,
    tiled_loss,
    tiled_mlp,
    unsaved,
    validation,
    weights,
)

MARK = "lighthouse_hooks"
"""The attribute of a wrapped function that names the subjects around it."""


def wrap(owner: Any, name: str, subject: Hashable, around: Callable[..., Any]) -> None:
    """Have `owner.name(…)` do `around(what was there, …)`, once for each subject; the last one installed is outermost."""
    inner = getattr(owner, name)
    marked = getattr(inner, MARK, ())
    if subject in marked:
        return

    @wraps(inner)
    def hooked(*args: Any, **named: Any) -> Any:
        return around(inner, *args, **named)

    setattr(hooked, MARK, (*marked, subject))
    setattr(owner, name, hooked)


def adapt_machine() -> None:
    """Before Megatron is initialized: no compiler is needed where the helper is compiled, no GPU, and what attends is asked for
    in words that it reads."""
    te_flash.mend()
    if machine.has_dataset_helpers():
        wrap(initialize, "_compile_dependencies", "machine", machine.skip_compilation)
    if not torch.cuda.is_available():
        wrap(loop, "initialize_megatron", "machine", machine.initialize_without_cuda)


def follow_training() -> None:
    """For every run of the entry point, on every rank, before training."""
    load_weights()
    keep_documents_apart()
    tile()  # what it sees of moved masks is what documents made of them
    wrap(loop, "training_log", "progress", progress.Progress().training_log)
    wrap(loop, "train", "progress", progress.train)
    wrap(loop, "load_checkpoint", "rates", rates.load_checkpoint)
    wrap(loop, "load_checkpoint", "unsaved", unsaved.load_checkpoint)
    wrap(loop, "evaluate", "conversations", validation.evaluate)
    wrap(loop, "dummy_train_step", "skip", skip.skip_step)
    wrap(loop, "train_step", "finite", finite.train_step)
    wrap(loop, "save_checkpoint", "finite", finite.save_checkpoint)
    wrap(schedules, "create_cudagraphs", "captured", captured.of_layers)
    wrap(loop.TECudaGraphHelper, "create_cudagraphs", "captured", captured.by_helper)
    wrap(loop.FullCudaGraphWrapper, "__call__", "captured", captured.of_iteration)
    wrap(full_cuda_graph, "get_graph_pool", "captured", captured.pool)
    wrap(loop.FullCudaGraphWrapper, "__call__", "finite", finite.whole_iteration)


def tile() -> None:
    """For every model, on every rank."""
    wrap(mlp.MLP, "forward", "tiled mlp", tiled_mlp.forward)
    for model in (gpt_model.GPTModel, hybrid_model.HybridModel):
        wrap(model, "forward", "tiled loss", tiled_loss.forward)
    wrap(multi_token_prediction, "roll_tensor", "tiled loss", loss_weights.rolled)
    wrap(multi_token_prediction, "_compute_mtp_acceptance_counts", "tiled loss", tiled_loss.mtp_counts)


def keep_documents_apart() -> None:
    """For models that predict further tokens of packed documents."""
    wrap(multi_token_prediction, "roll_tensor", "documents", further_tokens.roll)
    wrap(gpt_builder, "mtp_block_spec", "documents", further_tokens.block_spec)


def stack_locally() -> None:
    """For hybrid models of local modules: their last norm is one too."""
    from megatron_lighthouse.mcore.attention.hybrid_specs import final_norm

    wrap(hybrid_block, "TENorm", "local norm", final_norm)


def load_weights() -> None:
    """For every load of a checkpoint, on every rank."""
    wrap(checkpointing, "_load_global_dist_base_checkpoint", "weights", weights.load_base)


def follow_switch(settings: LighthouseSettings) -> None:
    """For layers that may become dense; once for equal settings, however many parts of a model ask. On every rank."""
    follows, subject = switch.Switch(settings), ("switch", settings)
    wrap(loop, "train_step", subject, follows.train_step)
    wrap(loop, "checkpoint_and_decide_exit", subject, follows.checkpoint_and_decide_exit)
    wrap(checkpointing, "_async_delete_checkpoint_impl", subject, follows.delete_checkpoint)


def log_selection(args: argparse.Namespace, settings: LighthouseSettings) -> None:
    """Log what selection does, if that is asked for. On every rank, before training.

    Raises:
        ValueError: what cannot be as asked.
    """
    selection_log.check(args, settings)
    if logged := selection_log.logged(args, settings):
        wrap(loop, "train_step", "selection log", logged.train_step)


def log_layers(args: argparse.Namespace, settings: LighthouseSettings) -> None:
    """Log what the layers record of themselves, if that is asked for. On every rank, before training."""
    if interval := settings.base_config.telemetry_interval:
        heads = args.num_attention_heads
        shape = Shape(1, heads, args.num_query_groups if args.group_query_attention else heads, args.kv_channels, 4)
        telemetry = settings.base.telemetry(settings.base_config)
        logged = layer_log.Logged(telemetry, interval, settings.holding(args.num_layers), shape, args.tensorboard_dir)
        wrap(loop, "train_step", "layer log", logged.train_step)
        wrap(loop, "train", "layer log", logged.train)
