"""Packed documents (`--dataloader-inter-document-masking`): with what they do not go together. Imports no Megatron."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from megatron_lighthouse.variant import beyond_softmax

FLAG = "--dataloader-inter-document-masking"
ROTATED = ("rope", "yarn", "learned_absolute", "none")
"""Positions that are counted anew in each document."""


def asked(args: Namespace) -> bool:
    """Whether rows hold packed documents."""
    return bool(getattr(args, "dataloader_inter_document_masking", False))


def remark(args: Namespace) -> str:
    """What is said of them at the start of a run."""
    said = f"{FLAG}: attention's work goes by the lengths of documents."
    if args.context_parallel_size > 1:
        said += " So do the bytes that context-parallel ranks send."
    if args.data_parallel_size > 1:
        said += (
            f" The {args.data_parallel_size} data-parallel ranks have other documents each, so that the one with the longest "
            "sets the pace of a step."
        )
    return f"{said} tokens/s counts whole rows, which hold no padding."


def mask_problem(args: Namespace) -> str | None:
    """Why documents are not separated by a mask: causal attention reads none."""
    if not getattr(args, "reset_attention_mask", False):
        return None
    engine = (
        getattr(args, "transformer_impl", "local") == "transformer_engine" and getattr(args, "context_parallel_size", 1) > 1
    )
    needs = [" and --transformer-impl local"] if engine else []
    needs += [" without --lighthouse-budget"] if "lighthouse_budget" in getattr(args, "said", ()) else []
    return (
        "--reset-attention-mask separates documents by a mask of seq x seq, which causal kernels do not read: use "
        f"{FLAG}{''.join(needs)}, which keeps them apart without one."
    )


def document_problems(args: Namespace, config: Any) -> Iterator[str]:
    """What does not go with packed documents in this model (a TransformerConfig), each with what would work."""
    if not asked(args):
        return
    kind = getattr(args, "position_embedding_type", "rope")
    if kind not in ROTATED:
        yield f"{FLAG} with --position-embedding-type {kind} is not done: use {' or '.join(ROTATED)}."
    yield from _latent(config)
    if getattr(config, "experimental_attention_variant", None):
        yield f"{FLAG} with --experimental-attention-variant is not done: leave one of them out."
    if (graphs := getattr(config, "cuda_graph_impl", "none")) != "none":
        yield f"{FLAG} with --cuda-graph-impl {graphs} is not done, for each batch has other documents: leave one of them out."
    yield from _local(config) if config.transformer_impl == "local" else _of_te(config)


def upstream_problems(args: Namespace, config: Any) -> Iterator[str]:
    """What upstream's pretrain_gpt.py, whose loop hands out the rows, does not do with packed documents."""
    if not asked(args):
        return
    use = "use python -m megatron_lighthouse.pretrain_gpt"
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


def _latent(config: Any) -> Iterator[str]:
    """Of multi-latent attention, whose values have a width of their own."""
    if not getattr(config, "multi_latent_attention", False):
        return
    if config.transformer_impl != "local":
        yield (
            f"{FLAG} with --multi-latent-attention is not done by --transformer-impl {config.transformer_impl}: use local, or "
            "--group-query-attention."
        )
    if getattr(config, "apply_rope_fusion", False):
        yield f"{FLAG} with --multi-latent-attention and fused RoPE is not done: add --no-rope-fusion."


def _of_te(config: Any) -> Iterator[str]:
    size = config.context_parallel_size
    if config.transformer_impl != "transformer_engine":
        yield f"{FLAG} with --transformer-impl {config.transformer_impl} is not done: use local or transformer_engine."
    elif size > 1:
        yield (
            f"{FLAG} with --context-parallel-size {size}: Transformer Engine shares out documents of multiples of {2 * size} "
            f"tokens alone: use --transformer-impl local, which takes any."
        )


def _local(config: Any) -> Iterator[str]:
    """Of attention without kept scores, which has no more than a causal softmax."""
    if config.attention_dropout:
        yield f"{FLAG} with --attention-dropout {config.attention_dropout} is not done: use --attention-dropout 0."
    for option in beyond_softmax(config):
        yield f"{FLAG} with {option} is not done by --transformer-impl local: leave one of them out."
    if getattr(config, "softmax_type", "vanilla") != "vanilla":
        yield f"{FLAG} with --softmax-type {config.softmax_type} is not done by --transformer-impl local: use vanilla."
