"""What a variant refuses, and what to use instead. Checked when the model is built, before memory or a collective."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lighthouse.context_parallel.schemes import comm_type_problem
from megatron_lighthouse.lighthouse.config import flag
from megatron_lighthouse.lighthouse.heads import heads_problem
from megatron_lighthouse.lighthouse.remedies import Allowed, anything
from megatron_lighthouse.mcore.command_line import documents, fp8, graphs, inner, named, rope, stored
from megatron_lighthouse.mcore.command_line.layers import layer_problems, window_problem
from megatron_lighthouse.mcore.command_line.lengths import limits_of, settings_problems
from megatron_lighthouse.mcore.command_line.own_parts import engine_problems
from megatron_lighthouse.mcore.command_line.settings import (
    LighthouseSettings,
    head_dims,
    heads_of_rank,
    of_edge,
    own_comm_types,
)
from megatron_lighthouse.mcore.command_line.stage import Schedule
from megatron_lighthouse.options import in_flags

if TYPE_CHECKING:  # what needs no Megatron is asked on a login node too
    from megatron.core.transformer import TransformerConfig


DYNAMIC = ("hybrid_context_parallel", "dynamic_context_parallel")
"""One option: Megatron renamed it after 0.19 (5679)."""
PACKED = {
    **{name: f"--{name.replace('_', '-')} (packed sequences)" for name in DYNAMIC},
    "perform_rl_step": "--perform-rl-step (text by inference paths)",
}
CP_LAYOUTS = ("attention_cp_layout", "linear_cp_layout")
"""Options of Megatron after 0.19 (6387)."""


def check(config: TransformerConfig, settings: LighthouseSettings, seq_length: int | None) -> None:
    """Refuse a model that Lighthouse cannot train as asked.

    Args:
        seq_length: N in tokens, where it is known; else the first forward pass checks it.

    Raises:
        ValueError: every rule that is broken, one a line, each with what would work.
    """
    _raise(settings, [*model_problems(config, settings, seq_length)])


def check_run(args: Namespace, config: TransformerConfig, settings: LighthouseSettings) -> None:
    """`check`, and the data and run options that only Megatron's arguments know, before the process group exists.

    Raises:
        ValueError: as `check`.
    """
    _raise(settings, [*dict.fromkeys(run_problems(args, config, settings))])


def run_problems(args: Namespace, config: TransformerConfig, settings: LighthouseSettings) -> Iterator[str]:
    """What `check_run` refuses, each rule in a sentence."""
    length = None if documents.asked(args) else args.seq_length  # of which each document has its own
    yield from model_problems(config, settings, length, limits_of(args, config))
    yield from argument_problems(args, settings)
    yield from inner.problems(config, settings, documents.asked(args))
    yield from fp8.run_problems(args, config)
    yield from _documents(args, config, settings)
    yield from _schedule(args, settings.schedule)
    yield from graphs.beside_copies(args, config, own_comm_types(config, settings))
    kind = getattr(args, "position_embedding_type", None)
    positions = [*named.of_base(settings.base.position_problems(settings.base_config, kind), settings)]
    yield from positions
    if settings.attention.selects and settings.rope == rope.LAST:
        yield from rope.rope_problems(kind)
        yield from rope.last_problems(settings) if kind in ("rope", "yarn") and not positions else ()


def _raise(settings: LighthouseSettings, problems: list[str]) -> None:
    if problems:
        raise ValueError(f"--attention {settings.variant} cannot run as asked:\n  - " + "\n  - ".join(problems))


def model_problems(
    config: TransformerConfig, settings: LighthouseSettings, seq_length: int | None, allowed: Allowed = anything
) -> Iterator[str]:
    """Why Lighthouse cannot train this model: of the plan too, whose `config` has what is read here alone.

    Args:
        allowed: sizes that nothing else refuses.
    """
    settings = settings.in_model(config)
    yield from _unsupported(config, settings)
    if settings.attention.switches:
        holding = len(settings.holding(config.num_layers))
        if not holding and config.window_size:
            yield window_problem(config)
        else:
            further = getattr(config, "mtp_num_layers", None) or 0
            yield from layer_problems(settings.dense_first, settings.dense_last, holding, settings.edge_budget, further)
    if seq_length is None:
        return
    size, kind = config.context_parallel_size, graphs.kind_of(config)
    if found := [*settings_problems(settings, seq_length, size, allowed)]:
        yield from found
    elif kind != "none":
        yield from settings.attention.graph_problems(settings.config, seq_length, size, kind)
        if settings.base is not settings.attention:
            yield from settings.base.graph_problems(settings.base_config, seq_length, size, kind)
        if settings.edge:
            yield from map(of_edge, settings.attention.graph_problems(settings.edge, seq_length, size, kind))


def argument_problems(args: Namespace, settings: LighthouseSettings) -> Iterator[str]:
    """Why it cannot train with this data and these options of a run, of those that `args` have."""
    yield from packed_problems(args)
    yield from cp_layout_problems(args)
    backend = getattr(args, "attention_backend", None)
    if getattr(backend, "name", backend) == "local":
        yield (
            "--attention-backend local replaces the core attention of every layer after the specs are built: use "
            "--transformer-impl local, or another backend."
        )


def packed_problems(args: Namespace) -> Iterator[str]:
    """What no attention does in this entry point, and only Megatron's own in upstream's script."""
    yield from _packed(args)
    if message := documents.mask_problem(args):
        yield message


def _packed(given: object) -> Iterator[str]:
    for name, option in PACKED.items():
        if getattr(given, name, False):
            yield (
                f"{option} is not done by megatron_lighthouse: leave it out, or use Megatron-LM's own pretrain_gpt.py with "
                "dense attention."
            )


def _documents(args: Namespace, config: TransformerConfig, settings: LighthouseSettings) -> Iterator[str]:
    yield from documents.document_problems(args, config, dense=settings.attention.switches)
    if documents.asked(args):
        asks, found = documents.flag_of(args), list[str]()
        here = settings.in_model(config)  # where MLA may share selections among heads
        for own in filter(None, (here.config, here.edge)):
            found += settings.attention.document_problems(own, config.context_parallel_size)
        if not settings.base.native and settings.base is not settings.attention:
            of_base = settings.base.document_problems(settings.base_config, config.context_parallel_size)
            said = {problem.partition(" is ")[0] for problem in found}
            found += [one for one in named.of_base(of_base, settings) if one.partition(" is ")[0] not in said]
        yield from (problem.replace(documents.FLAG, asks) for problem in found)


def cp_layout_problems(given: object) -> Iterator[str]:
    """How tokens are dealt to context-parallel ranks, in arguments or a model's configuration: options newer than 0.19."""
    for name in CP_LAYOUTS:
        layout = getattr(given, name, None)
        if getattr(layout, "name", layout) not in (None, "zigzag"):
            yield (
                f"--{name.replace('_', '-')} {getattr(layout, 'name', layout)} deals tokens to context-parallel ranks "
                "otherwise than the zigzag that this project reads: use zigzag, or leave it out."
            )


def _schedule(args: Namespace, schedule: Schedule | None) -> Iterator[str]:
    if schedule is None:
        return
    iterations = args.train_iters
    if not iterations and args.train_samples and args.step_batch_size_schedule is None:
        iterations = args.train_samples // args.global_batch_size
    yield from schedule.problems(iterations or None)
    yield from _skipped_switches(args, schedule)


def _skipped_switches(args: Namespace, schedule: Schedule) -> Iterator[str]:
    """Whether the checkpoint before a switch is of an iteration that is not trained, and so not saved."""
    load, skipped = getattr(args, "load", None), set(getattr(args, "iterations_to_skip", None) or ())
    saved = (stored.last_iteration(Path(load)) if load else None) or 0
    for name, at in schedule.changes.items():
        if at not in skipped or not args.save or saved >= at:
            continue
        others = [other for other in schedule.changes.values() if other != at]
        tried = (*range(at - 1, 0, -1), *range(at + 1, at + len(skipped) + 1))
        # the warm-up stays before stage 2
        found = (i for i in tried if i not in skipped and all((i < other) == (at < other) and i != other for other in others))
        use = next((f"use {name} {i}" for i in found), "leave one of them out")
        yield (
            f"{name} {at} is to save a checkpoint of an iteration that --iterations-to-skip (or the file of "
            f"--result-rejected-tracker-filename) leaves out: {use}."
        )


def _unsupported(config: TransformerConfig, settings: LighthouseSettings) -> Iterator[str]:
    yield from _attention(config, settings)
    yield from cp_layout_problems(config)
    yield from _packed(config)
    odd = [one for one in (settings.attention, settings.base) if not (one.native or one.latent)]
    if config.multi_latent_attention and odd:
        asked = named.asked_by(odd[0], settings)
        yield f"--multi-latent-attention is not done by {asked}: leave it out, or use another attention."
    if settings.attention.selects and config.num_attention_heads:
        dims = head_dims(config) if config.multi_latent_attention else (0, None)
        if message := heads_problem(settings.config, max(1, heads_of_rank(config)[1]), *dims):
            yield in_flags(message)
    if getattr(config, "experimental_attention_variant", None):
        yield (
            f"--experimental-attention-variant {config.experimental_attention_variant} brings its own attention: use one or "
            "the other."
        )
    if config.transformer_impl == "inference_optimized" or config.flash_decode:
        yield (
            "inference paths (--transformer-impl inference_optimized, --flash-decode) bypass core attention: serve the "
            "checkpoint with --attention dense."
        )
    yield from fp8.problems(config, settings)
    further = getattr(config, "mtp_num_layers", None) or 0  # Megatron counts these from 1, as the model's own
    if further and (settings.edge_budget is not None or further > settings.dense_first or settings.streams):
        use = f"leave {flag('edge_budget')} out, and use {flag('dense_first')} {further} or more."
        yield (
            f"--mtp-num-layers {further} makes layers that are to stay dense, and go by the numbers of the first of the model: "
            f"{use if settings.base.native else 'leave it out, or use --attention dense.'}"
        )
    if settings.schedule is not None:
        yield from graphs.switch_problems(config, settings.schedule)
    yield from graphs.copies_problems(config, own_comm_types(config, settings))
    yield from _comm_types(config, settings)
    yield from engine_problems(config) if settings.attention.switches else ()  # else no layer is dense
    yield from _streams(config, settings)


def _attention(config: TransformerConfig, settings: LighthouseSettings) -> Iterator[str]:
    """What the attention refuses, and of the one that it selects for what it does not refuse itself."""
    said = [*settings.attention.problems(settings.config, config)]
    yield from said
    if not settings.base.native and settings.base is not settings.attention:
        options = {problem.split()[0] for problem in said}
        found = named.of_base(settings.base.problems(settings.base_config, config), settings)
        yield from (problem for problem in found if problem.split()[0] not in options)


def _streams(config: TransformerConfig, settings: LighthouseSettings) -> Iterator[str]:
    """Where more is projected from a layer's input than q, k and v."""
    if not settings.streams:
        return
    if getattr(config, "fused_single_qkv_rope", False):
        yield f"fused_single_qkv_rope rotates q, k and v alone: turn it off with --attention {settings.variant}."
    if getattr(config, "qk_clip", False):
        yield f"--qk-clip rescales the rows of q and k alone: leave it out with --attention {settings.variant}."


def unnormed(settings: LighthouseSettings) -> str:
    """Why no stream can be read from a layer's input where the norm is part of linear_qkv."""
    names = ", ".join(f"linear_{stream.name}" for stream in settings.streams)
    return (
        f"--attention {settings.variant} reads a layer's normed input by {names}, and this layer spec norms it within "
        "linear_qkv: use --transformer-impl local."
    )


def _comm_types(config: TransformerConfig, settings: LighthouseSettings) -> Iterator[str]:
    """Of this project's own attention over shards; what Transformer Engine's can do it says itself."""
    heads, groups = (max(1, n) for n in heads_of_rank(config))  # fewer groups than ranks are refused elsewhere
    for kind in own_comm_types(config, settings):
        if message := comm_type_problem(kind, heads, groups, config.context_parallel_size):
            yield in_flags(message)
