"""What Lighthouse refuses, and what to use instead. Checked when the model is built, before memory or a collective."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lighthouse.context_parallel.copies import SWITCH
from megatron_lighthouse.context_parallel.schemes import comm_type_problem
from megatron_lighthouse.lighthouse.config import LighthouseConfig, flag
from megatron_lighthouse.lighthouse.scorers import SCORERS
from megatron_lighthouse.lighthouse.sharded.select import is_local
from megatron_lighthouse.mcore.command_line import rope, stored
from megatron_lighthouse.mcore.command_line.settings import LighthouseSettings, heads_of_rank, of_edge, own_comm_types

if TYPE_CHECKING:  # what needs no Megatron is asked on a login node too
    from megatron.core.transformer import TransformerConfig


DYNAMIC = ("hybrid_context_parallel", "dynamic_context_parallel")
"""One option: Megatron renamed it after 0.19 (5679)."""
CP_LAYOUTS = ("attention_cp_layout", "linear_cp_layout")
"""Options of Megatron after 0.19 (6387)."""


def check(config: TransformerConfig, settings: LighthouseSettings, seq_length: int | None) -> None:
    """Refuse a model that Lighthouse cannot train as asked.

    Args:
        seq_length: N in tokens, where it is known; else the first forward pass checks it.

    Raises:
        ValueError: every rule that is broken, one a line, each with what would work.
    """
    _raise([*_model(config, settings, seq_length)])


def check_run(args: Namespace, config: TransformerConfig, settings: LighthouseSettings) -> None:
    """`check`, and the data and run options that only Megatron's arguments know, before the process group exists.

    Raises:
        ValueError: as `check`.
    """
    problems = [*_model(config, settings, args.seq_length), *_arguments(args), *_stage2(args, settings)]
    if settings.rope == rope.LAST:
        problems += rope.rope_problems(config, getattr(args, "position_embedding_type", None))
    _raise([*dict.fromkeys(problems)])


def _raise(problems: list[str]) -> None:
    if problems:
        raise ValueError("--attention lighthouse cannot run as asked:\n  - " + "\n  - ".join(problems))


def _model(config: TransformerConfig, settings: LighthouseSettings, seq_length: int | None) -> Iterator[str]:
    yield from _unsupported(config, settings)
    holding = len(settings.holding(config.num_layers))
    yield from layer_problems(settings.dense_first, settings.dense_last, holding, settings.edge_budget)
    if seq_length is None:
        return
    lengths = [*settings_problems(settings, seq_length, config.context_parallel_size)]
    yield from lengths or _dealt_in_a_graph(config, settings.config, seq_length)
    if settings.edge and not lengths:
        yield from map(of_edge, _dealt_in_a_graph(config, settings.edge, seq_length))


def settings_problems(settings: LighthouseSettings, seq_length: int, ranks: int) -> Iterator[str]:
    """Why so many tokens on so many context-parallel ranks do not fit the layers, edge layers among them."""
    yield from length_problems(settings.config, seq_length, ranks)
    if settings.edge:
        yield from map(of_edge, length_problems(settings.edge, seq_length, ranks))


def length_problems(config: LighthouseConfig, seq_length: int, ranks: int) -> Iterator[str]:
    """Why so many tokens on so many context-parallel ranks do not fit the pyramid or the scorer."""
    try:
        config.geometry(seq_length, ranks)
    except ValueError as error:
        yield str(error)
    if message := SCORERS[config.scorer].problem(seq_length, ranks):
        yield message


def _dealt_in_a_graph(config: TransformerConfig, lighthouse: LighthouseConfig, seq_length: int) -> Iterator[str]:
    """How many rows go to which rank is read by the host, in every layer."""
    graphs, size = getattr(config, "cuda_graph_impl", "none"), config.context_parallel_size
    if graphs == "none" or size == 1 or is_local(lighthouse.geometry(seq_length, size), size):
        return
    fits = lighthouse.budget // (2 * size)
    other = f" (such as {fits})" if lighthouse.budget % (4 * size) == 0 else ""  # tile budgets are even
    yield (
        f"--cuda-graph-impl {graphs} cannot capture rows that are dealt out to --context-parallel-size {size} ranks, as with "
        f"{flag('budget')} {lighthouse.budget} and {flag('tile_budget')} {lighthouse.tile_budget}: leave it out, or use a "
        f"{flag('tile_budget')} that makes their quotient a multiple of {2 * size}{other}."
    )


def _arguments(args: Namespace) -> Iterator[str]:
    refused = {
        "reset_attention_mask": "--reset-attention-mask separates documents by a mask, which Lighthouse does not read: "
        "leave it out (documents in one sequence then attend to each other, as without it).",
        "sft": "--sft packs sequences (thd): use --attention dense for it.",
        "dataloader_inter_document_masking": "--dataloader-inter-document-masking packs sequences (thd): leave it out, or use "
        "--attention dense.",
        **{
            name: f"--{name.replace('_', '-')} packs sequences (thd): leave it out, or use --attention dense."
            for name in DYNAMIC
        },
        "perform_rl_step": "--perform-rl-step generates text by inference paths that bypass core attention: use --attention "
        "dense.",
    }
    yield from (message for name, message in refused.items() if getattr(args, name, False))
    yield from cp_layout_problems(args)
    backend = getattr(args, "attention_backend", None)
    if getattr(backend, "name", backend) == "local":
        yield (
            "--attention-backend local replaces the core attention of every layer after the specs are built: use "
            "--transformer-impl local, or another backend."
        )


def cp_layout_problems(given: object) -> Iterator[str]:
    """How tokens are dealt to context-parallel ranks, in arguments or a model's configuration: options newer than 0.19."""
    for name in CP_LAYOUTS:
        layout = getattr(given, name, None)
        if getattr(layout, "name", layout) not in (None, "zigzag"):
            yield (
                f"--{name.replace('_', '-')} {getattr(layout, 'name', layout)} deals tokens to context-parallel ranks "
                "otherwise than the zigzag that this project reads: use zigzag, or leave it out."
            )


def _stage2(args: Namespace, settings: LighthouseSettings) -> Iterator[str]:
    if settings.stage2 is None:
        return
    iterations = args.train_iters
    if not iterations and args.train_samples and args.step_batch_size_schedule is None:
        iterations = args.train_samples // args.global_batch_size
    yield from settings.stage2.problems(iterations or None)
    yield from _skipped_switch(args, settings.stage2.at)


def _skipped_switch(args: Namespace, at: int) -> Iterator[str]:
    """Whether the checkpoint before the switch is of an iteration that is not trained, and so not saved."""
    load, skipped = getattr(args, "load", None), set(getattr(args, "iterations_to_skip", None) or ())
    saved = stored.last_iteration(Path(load)) if load else None
    if at not in skipped or not args.save or (saved or 0) >= at:
        return
    use = next(i for i in (*range(at - 1, 0, -1), *range(at + 1, at + len(skipped) + 1)) if i not in skipped)
    yield (
        f"{flag('stage2_at')} {at} is to save a checkpoint of an iteration that --iterations-to-skip (or the file of "
        f"--result-rejected-tracker-filename) leaves out: use {flag('stage2_at')} {use}."
    )


def _unsupported(config: TransformerConfig, settings: LighthouseSettings) -> Iterator[str]:
    yield from dropout_problems(config.attention_dropout)
    yield from cp_layout_problems(config)
    for name in DYNAMIC:
        if getattr(config, name, False):
            yield f"--{name.replace('_', '-')} packs sequences (thd): leave it out, or use --attention dense."
    if config.window_size is not None:
        yield (
            f"--window-size {config.window_size} (sliding window) has no meaning among gathered entries: leave it out, or use "
            "--attention dense."
        )
    if config.multi_latent_attention:
        yield "--multi-latent-attention is not supported: use --group-query-attention, or --attention dense."
    if SCORERS[settings.config.scorer].by_length:
        others = " or ".join(name for name, scorer in SCORERS.items() if not scorer.by_length)
        for name, what in (("qk_layernorm", "--qk-layernorm"), ("qk_l2_norm", "--qk-l2-norm")):
            if getattr(config, name, False):
                yield (
                    f"{what} makes all queries and keys nearly equally long, so that {flag('scorer')} "
                    f"{settings.config.scorer}, which goes by their length, selects at random: leave it out, or use "
                    f"{flag('scorer')} {others}."
                )
    if getattr(config, "softmax_type", "vanilla") != "vanilla":
        yield f"--softmax-type {config.softmax_type} counts a sink once per gathered row: use --softmax-type vanilla."
    if getattr(config, "experimental_attention_variant", None):
        yield (
            f"--experimental-attention-variant {config.experimental_attention_variant} brings its own attention: use one or "
            "the other."
        )
    for name, option in (("qk_clip", "--qk-clip"), ("log_max_attention_logit", "--log-max-attention-logit")):
        if getattr(config, name, False):
            yield (
                f"{option} goes by the greatest logit of a layer, which Lighthouse has of gathered rows alone, not of tokens: "
                "leave it out, or use --attention dense."
            )
    if config.transformer_impl == "inference_optimized" or config.flash_decode:
        yield (
            "inference paths (--transformer-impl inference_optimized, --flash-decode) bypass core attention: serve the "
            "checkpoint with --attention dense."
        )
    for name in ("fp8_dot_product_attention", "fp8_multi_head_attention"):
        if getattr(config, name, False):
            yield f"--{name.replace('_', '-')} is not supported: leave it out (fp8 in the linear layers works without it)."
    further = getattr(config, "mtp_num_layers", None) or 0  # Megatron counts these from 1, as the model's own
    if further and (settings.edge_budget is not None or further > settings.dense_first):
        yield (
            f"--mtp-num-layers {further} makes layers that are to stay dense, and go by the numbers of the first of the model: "
            f"leave {flag('edge_budget')} out, and use {flag('dense_first')} {further} or more."
        )
    graphs = getattr(config, "cuda_graph_impl", "none")
    if settings.stage2 is not None and graphs != "none":
        at = settings.stage2.at
        yield (
            f"--cuda-graph-impl {graphs} repeats what the first iterations did, so that {flag('stage2_at')} {at} would change "
            f"nothing: leave one of them out (--exit-interval {at} and a second job with --attention dense give the same run)."
        )
    if message := copies_in_a_graph(config, own_comm_types(config, settings)):
        yield message
    yield from _comm_types(config, settings)
    groups, tensor_parallel = config.num_query_groups or config.num_attention_heads, config.tensor_model_parallel_size
    if groups % tensor_parallel:
        yield (
            f"--num-query-groups {groups} must be a multiple of --tensor-model-parallel-size {tensor_parallel}, for each "
            f"key/value head selects once: use {groups} or a divisor of it as the tensor-parallel size."
        )


def _comm_types(config: TransformerConfig, settings: LighthouseSettings) -> Iterator[str]:
    """Of this project's own attention over shards; what Transformer Engine's can do it says itself."""
    heads, groups = (max(1, n) for n in heads_of_rank(config))  # fewer groups than ranks are refused elsewhere
    for kind in own_comm_types(config, settings):
        if message := comm_type_problem(kind, heads, groups, config.context_parallel_size):
            yield message


def copies_in_a_graph(config: TransformerConfig, comm_types: Sequence[str]) -> str | None:
    """Why a graph cannot hold this project's own attention over shards by these schemes, dense too; None where it can."""
    graphs = getattr(config, "cuda_graph_impl", "none")
    if graphs == "none" or "p2p" not in comm_types or os.environ.get(SWITCH) == "0":
        return None
    return (
        f"--cuda-graph-impl {graphs} would repeat the numbers of the messages by which --cp-comm-type p2p copies between GPUs: "
        f"leave it out, use --cp-comm-type all_gather, or set {SWITCH}=0 in the environment."
    )


def dropout_problems(dropout: float) -> Iterator[str]:
    """Of attention, whatever the model is."""
    if dropout:
        yield f"--attention-dropout {dropout} would drop whole windows: use --attention-dropout 0 (--hidden-dropout works)."


def layer_problems(dense_first: int, dense_last: int, layers: int, edge_budget: int | None = None) -> Iterator[str]:
    """Of which of the model's layers are dense, or have a budget of their own, of as many as hold attention."""
    for name, count in (("dense_first", dense_first), ("dense_last", dense_last)):
        if count < 0:
            yield f"{flag(name)} {count} must not be negative: use 0 to leave no layer dense."
    if edge_budget is not None and not dense_first + dense_last:
        yield (
            f"{flag('edge_budget')} {edge_budget} is of the first and last layers, and {flag('dense_first')} 0 and "
            f"{flag('dense_last')} 0 name none: leave it out, or name some, such as 2 and 2."
        )
    if dense_first + dense_last >= layers:
        yield (
            f"{flag('dense_first')} {dense_first} and {flag('dense_last')} {dense_last} leave none of {layers} layers to "
            "Lighthouse, of those that hold attention: use smaller numbers, or --attention dense."
        )
