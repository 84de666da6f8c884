"""What `check` asks of a run's numbers: iterations, the sequence length, the layers. Imports no Megatron."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from megatron_lighthouse.mcore.command_line.arguments import nothing_to_switch
from megatron_lighthouse.mcore.command_line.checks import layer_problems, settings_problems
from megatron_lighthouse.mcore.command_line.settings import settings_from
from megatron_lighthouse.variants import VARIANTS


def sizes(args: argparse.Namespace) -> Iterator[str]:
    """Iterations, and what the attention says of them, of the layers, and of the sequence length on this many ranks."""
    if args.train_samples is not None:
        iterations = args.train_samples // args.global_batch_size if args.global_batch_size else "N"
        yield (
            f"--train-samples {args.train_samples} names no iteration at which a job is done, which these scripts count: "
            f"use --train-iters {iterations} alone."
        )
    elif not args.train_iters:
        yield "--train-iters is missing: a requeued job goes on until the checkpoint is there."
    settings = None
    variant = VARIANTS[args.attention]
    if not variant.native:
        try:
            settings = settings_from(args)
        except ValueError as error:
            yield str(error)
    if not variant.switches and not args.spec and (message := nothing_to_switch(args)):  # a spec may be that of Lighthouse
        yield message
    if settings:
        if not args.use_checkpoint_args:  # which says otherwise, perhaps
            yield from variant.dropout_problems(args.attention_dropout)
        if args.num_layers and variant.switches:
            holding = len(settings.holding(args.num_layers))
            yield from layer_problems(settings.dense_first, settings.dense_last, holding, settings.edge_budget)
        if settings.stage2:
            yield from settings.stage2.problems(args.train_iters or None)
    if args.seq_length is None:
        if not args.use_checkpoint_args:
            yield "--seq-length is missing."
    elif (args.max_position_embeddings or args.seq_length) < args.seq_length:
        yield (
            f"--max-position-embeddings {args.max_position_embeddings} must be at least --seq-length {args.seq_length}: "
            f"use {args.seq_length}."
        )
    elif settings:
        yield from settings_problems(settings, args.seq_length, args.context_parallel_size)
    elif variant.native:
        yield from variant.length_problems(None, args.seq_length, args.context_parallel_size)
