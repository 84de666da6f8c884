"""Packed documents (`--dataloader-inter-document-masking`): with what they do not go together. Imports no Megatron."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from megatron_lighthouse.mcore.command_line import conversations
from megatron_lighthouse.mcore.command_line.layers import local_window_problem

FLAG = "--dataloader-inter-document-masking"
ROTATED = ("rope", "yarn", "learned_absolute", "none")
"""Positions that are counted anew in each document."""


def asked(args: Namespace) -> bool:
    """Whether rows hold packed documents, of which conversations are a kind."""
    return bool(getattr(args, "dataloader_inter_document_masking", False)) or conversations.asked(args)


def flag_of(args: Namespace) -> str:
    """What asks for them."""
    return conversations.FLAG if conversations.asked(args) else FLAG


def remark(args: Namespace) -> str:
    """What is said of them at the start of a run."""
    said = f"{flag_of(args)}: attention's work goes by the lengths of documents."
    if args.context_parallel_size > 1:
        said += " So do the bytes that context-parallel ranks send."
    if args.data_parallel_size > 1:
        said += (
            f" The {args.data_parallel_size} data-parallel ranks have other documents each, so that the one with the longest "
            "sets the pace of a step."
        )
    if conversations.asked(args):
        return f"{said} tokens/s leaves out the padding at the ends of rows."
    return f"{said} tokens/s counts whole rows, which hold no padding."


def mask_problem(args: Namespace) -> str | None:
    """Why documents are not separated by a mask: causal attention reads none."""
    if not getattr(args, "reset_attention_mask", False):
        return None
    reads = "--reset-attention-mask separates documents by a mask of seq x seq, which causal kernels do not read"
    if conversations.asked(args):
        return f"{reads}: leave it out: conversations are kept apart without it."
    engine = (
        getattr(args, "transformer_impl", "local") == "transformer_engine" and getattr(args, "context_parallel_size", 1) > 1
    )
    needs = [" and --transformer-impl local"] if engine else []
    needs += [" without --lighthouse-budget"] if "lighthouse_budget" in getattr(args, "said", ()) else []
    return f"{reads}: use {FLAG}{''.join(needs)}, which keeps them apart without one."


def document_problems(args: Namespace, config: Any, dense: bool = True) -> Iterator[str]:
    """What does not go with packed documents in this model (a TransformerConfig), each with what would work.

    Args:
        dense: whether some layers are dense; else their attention says itself what it does not do.
    """
    if not asked(args):
        return
    flag, kind = flag_of(args), getattr(args, "position_embedding_type", "rope")
    if kind not in ROTATED:
        yield f"{flag} with --position-embedding-type {kind} is not done: use {' or '.join(ROTATED)}."
    yield from _latent(flag, config)
    if getattr(config, "experimental_attention_variant", None):
        yield f"{flag} with --experimental-attention-variant is not done: leave one of them out."
    if (graphs := getattr(config, "cuda_graph_impl", "none")) != "none":
        yield f"{flag} with --cuda-graph-impl {graphs} is not done, for each batch has other documents: leave one of them out."
    if config.transformer_impl != "local":
        yield from _of_te(flag, config)
    elif dense:
        yield from _local(flag, config)


def upstream_problems(args: Namespace, config: Any) -> Iterator[str]:
    """What upstream's pretrain_gpt.py, whose loop hands out the rows, does not do with packed documents."""
    if not asked(args):
        return
    use = "use python -m megatron_lighthouse.pretrain_gpt"
    if conversations.asked(args):
        yield f"{conversations.FLAG} is not done in upstream's pretrain_gpt.py: {use}, or --attention dense."
        return
    if (ranks := config.context_parallel_size) > 1:
        yield (
            f"{FLAG} with --context-parallel-size {ranks}: upstream's pretrain_gpt.py cuts packed rows as one sequence, and "
            f"rotates them as documents: {use}, or --context-parallel-size 1."
        )
    if further := getattr(config, "mtp_num_layers", None):
        yield (
            f"{FLAG} with --mtp-num-layers {further}: in upstream's pretrain_gpt.py a document's last token but one predicts "
            f"the next document's first: {use}, or leave one of them out."
        )
    if getattr(config, "multi_latent_attention", False):
        yield f"{FLAG} with --multi-latent-attention is not done in upstream's pretrain_gpt.py: {use}."
    if (stages := config.pipeline_model_parallel_size) > 2:
        yield (
            f"{FLAG} with --pipeline-model-parallel-size {stages}: upstream's pretrain_gpt.py tells the first and last stage "
            f"alone where documents end: {use}, or --pipeline-model-parallel-size 2."
        )


def _latent(flag: str, config: Any) -> Iterator[str]:
    """Of multi-latent attention, whose values have a width of their own."""
    if not getattr(config, "multi_latent_attention", False):
        return
    if getattr(config, "apply_rope_fusion", False):
        yield f"{flag} with --multi-latent-attention and fused RoPE is not done: add --no-rope-fusion."


def _of_te(flag: str, config: Any) -> Iterator[str]:
    size = config.context_parallel_size
    if config.transformer_impl != "transformer_engine":
        yield f"{flag} with --transformer-impl {config.transformer_impl} is not done: use local or transformer_engine."
    elif size > 1:
        yield (
            f"{flag} with --context-parallel-size {size}: Transformer Engine shares out documents of multiples of {2 * size} "
            f"tokens alone: use --transformer-impl local, which takes any."
        )


def _local(flag: str, config: Any) -> Iterator[str]:
    """Of attention without kept scores."""
    if config.attention_dropout:
        yield f"{flag} with --attention-dropout {config.attention_dropout} is not done: use --attention-dropout 0."
    for name in ("qk_clip", "log_max_attention_logit"):
        if getattr(config, name, False):
            option = f"--{name.replace('_', '-')}"
            yield f"{flag} with {option} is not done by --transformer-impl local: leave one of them out."
    if problem := local_window_problem(getattr(config, "window_size", None)):
        yield problem
