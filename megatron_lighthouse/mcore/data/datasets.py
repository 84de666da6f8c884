"""Datasets for the training loop: Megatron's indexed datasets, its mock data, and plain text."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training import get_args, print_rank_0
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from megatron_lighthouse.mcore.command_line import conversations, documents, stored
from megatron_lighthouse.mcore.data import blends, cached, text
from megatron_lighthouse.mcore.data.conversations import ConversationDataset
from megatron_lighthouse.mcore.refusal import RefusedError
from megatron_lighthouse.notice import say_once


def train_valid_test_datasets(sample_counts: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """Megatron's dataset provider. Every rank calls it."""
    args = get_args()
    if args.text_data and not args.train_data_path:
        train, valid = _on_first_rank("--text-data", lambda: text.write_datasets(args.text_data, _text_folder(args)))
        args.train_data_path, args.valid_data_path = [train], [valid]
        _say_where_text_changed(args)
        _say_where_text_is_short(args, sample_counts)
    sample_counts = _beyond_the_validated(args, sample_counts)
    kind = ConversationDataset if conversations.asked(args) else MockGPTDataset if args.mock_data else GPTDataset
    # one of the tensor-parallel ranks reads, and broadcasts what it read
    reads = partial(_reads_data, vp_stage)
    try:
        config = _dataset_config(args)
        if conversations.asked(args):
            _check_padding(config.tokenizer)
        elif not args.mock_data:
            _refresh_cache(args, config)
        print_rank_0(f"> building {kind.__name__} datasets for training, validation and test ...")
        datasets = BlendedMegatronDatasetBuilder(kind, sample_counts, reads, config).build()
    except (AssertionError, LookupError, TypeError, ValueError) as error:
        raise RefusedError(f"the datasets cannot be built: {type(error).__name__}: {error}") from error
    if args.skip_train and args.eval_iters:
        say_once(
            "--skip-train validates on the first samples of the validation data. A run's own evaluations each go on where the "
            "one before ended: those losses are of other samples."
        )
    # Megatron would read one sequence of validation even where it never validates, which a short text has not
    never = args.eval_iters == 0 and not args.full_validation
    return (datasets[0], None, None) if never else tuple(datasets)


def _beyond_the_validated(args: Namespace, counts: list[int]) -> list[int]:
    """The counts, with samples of validation beyond those that earlier jobs of the run used.

    Megatron asks for as many as there are evaluations to --train-iters, and starts behind those used: jobs that end between
    evaluations have one more each, and then none would be left, which it asserts.
    """
    train, valid, *rest = counts
    used = args.consumed_valid_samples or 0
    short = not args.skip_train and valid and valid <= used
    return [train, valid + used if short else valid, *rest]


def _reads_data(vp_stage: int | None) -> bool:
    """One of the tensor-parallel ranks does; of the pipeline's middle stages, where these are to know of documents."""
    needed = documents.asked(get_args()) or is_first_or_last_pipeline_stage(vp_stage)
    return mpu.get_tensor_model_parallel_rank() == 0 and needed


# Megatron calls a provider so marked on all ranks
train_valid_test_datasets.is_distributed = True  # type: ignore[attr-defined]


def _on_first_rank[T](what: str, function: Callable[[], T]) -> T:
    """What the function gives there, or its error, on every rank: none is left waiting."""
    outcome: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            outcome = [function()]
        except (OSError, ValueError) as error:
            outcome = [error]
        except Exception as error:  # of any kind, which may not pickle: the others wait for it
            outcome = [RuntimeError(f"{what}: {type(error).__name__}: {error}")]
    torch.distributed.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    result: T = outcome[0]
    return result


def _refresh_cache(args: Namespace, config: GPTDatasetConfig) -> None:
    """Let no order of samples be read that was cached for other data. The first rank decides, before any builds."""
    named = [blend for blend in (config.blend, *(config.blend_per_split or ())) if blend is not None]
    prefixes = [prefix for found, _ in named for prefix in found if not blends.remote(prefix)]
    options = ("dataloader_fast_cache_load", "dataloader_defer_npy_index_mmap")
    needed = next(("--" + name.replace("_", "-") for name in options if getattr(args, name)), None)
    changed = _on_first_rank("--data-cache-path", lambda: cached.refresh(prefixes, args.data_cache_path, needed))
    for prefix in changed:
        told = f"the data of {prefix} has changed since its order of samples was cached, which is built again"
        say_once(f"{told}: {_goes_on(args)}" if _trains_on(args) else told)


def _check_padding(tokenizer: Any) -> None:
    """Raises ValueError where the tokenizer lacks what the prompt format fills rows up with."""
    if tokenizer.pad is None:
        raise ValueError(
            f"--sft-tokenizer-prompt-format {get_args().sft_tokenizer_prompt_format} fills rows up with a token that "
            "--tokenizer-model has not: use default, or its model's tokenizer."
        )


def _say_where_text_changed(args: Namespace) -> None:
    """By the name of the data in the checkpoint, which text.py makes of the files' names, sizes and times."""
    if not _trains_on(args) or torch.distributed.get_rank():
        return
    start = stored.before(args, *stored.folders(args))
    was = getattr(start and start.args, "train_data_path", None)
    if was and Path(was[0]).name != Path(args.train_data_path[0]).name:
        say_once(f"--text-data has other files, sizes or times than when the checkpoint was saved: {_goes_on(args)}")


def _say_where_text_is_short(args: Namespace, sample_counts: list[int]) -> None:
    """Of each part: Megatron reads it as often as it takes, and a loss on few tokens says little of others."""
    parts = (("training", args.train_data_path, sample_counts[0]), ("validation", args.valid_data_path, sample_counts[1]))
    for part, prefixes, samples in parts:
        tokens, asked = text.tokens_of(prefixes[0]), samples * args.seq_length
        if asked >= 2 * tokens:
            say_once(f"--text-data has {tokens:,} tokens for {part}: each is read about {asked / tokens:,.0f} times.")


def _trains_on(args: Namespace) -> bool:
    """Whether samples were read before, in the order of the data as it then was."""
    return bool(args.consumed_train_samples) and not args.skip_train


def _goes_on(args: Namespace) -> str:
    return f"training goes on at sample {args.consumed_train_samples} of the new order, and may read some twice, others never"


def _text_folder(args: Namespace) -> str:
    return args.data_cache_path or os.path.join(args.save or ".", "data")


def _dataset_config(args: Namespace) -> GPTDatasetConfig:
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    sequences = None
    if args.per_dataset_sequences_path is not None:
        with open(args.per_dataset_sequences_path) as file:
            sequences = json.load(file)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        inter_document_masking=args.dataloader_inter_document_masking,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        sequences_per_dataset=sequences,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        context_parallel_size=1 if conversations.asked(args) else args.context_parallel_size,  # no conversation is filled up
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
    )
