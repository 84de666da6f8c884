"""What a hybrid model (`--hybrid-layer-pattern`) does not go together with. Imports no Megatron."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from importlib.util import find_spec

from megatron_lighthouse.mcore.command_line import documents
from megatron_lighthouse.mcore.command_line.layers import ATTEND, hybrid_pattern, written_pattern
from megatron_lighthouse.usage import as_flag

LOCAL = "*+-E|"
"""The symbols of layers that are made of Megatron's local modules too."""
OF_DOCUMENTS = LOCAL
"""Those of layers that keep packed documents apart: attention, and what looks at one token."""
PACKAGES = {"M": ("mamba_ssm", "mamba-ssm"), "G": ("fla", "flash-linear-attention")}
"""By symbol, what a layer imports, and what installs it."""

LAYERS = "MGD*+-E"
"""All symbols of layers."""
OF_PATTERN = """
    num_layers_per_virtual_pipeline_stage num_virtual_stages_per_pipeline_rank pipeline_model_parallel_layout
    account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split
""".split()
"""Options that say what a pattern says."""
OF_STAGES = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
"""Those that part a pattern without |."""


def word_problems(args: Namespace) -> Iterator[str]:
    """Why a pattern makes no model, or other words say something else.

    Args:
        args: as the words say, not validated: Megatron then overwrites what disagrees.
    """
    symbols, (flag, pattern) = hybrid_pattern(args), written_pattern(args)
    if symbols is None or pattern is None:
        return
    if args.hybrid_layer_pattern and args.hybrid_override_pattern:
        yield "--hybrid-layer-pattern and --hybrid-override-pattern, its old name, exclude each other: leave the latter out."
    if not symbols:
        yield f"{flag} {pattern} names no layer: give one symbol a layer, before any /."
    if odd := sorted({*pattern} - {*LAYERS, "|", "/"}):
        yield f"{flag} {pattern}: {' '.join(odd)} is no symbol of a layer: use {' '.join(LAYERS)}, and | between stages."
    elif "*" in pattern and {*pattern} & {"+", "D"}:
        yield f"{flag} {pattern} has both * and + or D, which no model has together: use one kind."
    if args.num_layers not in (None, len(symbols)):
        yield (
            f"--num-layers {args.num_layers} disagrees with {flag} {pattern}, of {len(symbols)} layers: leave --num-layers "
            "out, or give another pattern."
        )
    yield from _further_parts(flag, pattern)
    yield from _experts(args, flag, pattern)
    depths = pattern.count("/")
    if args.mtp_num_layers not in (None, depths):
        yield (
            f"--mtp-num-layers {args.mtp_num_layers} disagrees with {flag} {pattern}, of {depths} further tokens: leave "
            "--mtp-num-layers out, or give a /part for each."
        )
    for name in OF_PATTERN:
        if getattr(args, name):
            yield f"--{name.replace('_', '-')} does not go with {flag}: leave it out, and part the pattern by |."
    parts, size = pattern.partition("/")[0].split("|"), args.pipeline_model_parallel_size
    stages = len(parts)
    if symbols and not all(parts[1:-1]):
        yield (
            f"{flag} {pattern} has a stage without layers between others, whose gradients Megatron loses: give each a layer "
            "but the first and the last."
        )
    ends = tuple(getattr(args, name) for name in OF_STAGES)
    if stages > 1 and (own := [name for name in OF_STAGES if getattr(args, name) is not None]):
        asked = " and ".join(f"{as_flag(name)} {getattr(args, name)}" for name in own)
        yield f"{asked} does not go with {flag} {pattern}, whose | say what a stage has: leave it out, or | out."
    if stages > 1 and (stages % size or size == 1):
        yield (
            f"{flag} {pattern} has {stages} parts, and --pipeline-model-parallel-size {size} must be above 1 and divide them: "
            f"use --pipeline-model-parallel-size {stages}, or leave | out."
        )
    elif stages == 1 and ends == (None, None) and len(symbols) % size:
        yield (
            f"{flag} {pattern} has {len(symbols)} layers, which --pipeline-model-parallel-size {size} must divide where no | "
            "parts them: use another size, or | between stages."
        )


def _further_parts(flag: str, pattern: str) -> Iterator[str]:
    """Of a pattern's parts behind /, one for each further token."""
    further = pattern.split("/")[1:]
    if any("|" in part or not part for part in further) or len({*further}) > 1:
        fits = next((part for part in (part.replace("|", "") for part in further) if part), "*-")
        use = "/".join([pattern.partition("/")[0], *[fits] * len(further)])
        yield f"{flag} {pattern}: its parts behind / must be alike, of layers alone: use {use}, or leave them out."


def _experts(args: Namespace, flag: str, pattern: str) -> Iterator[str]:
    """Which layers have experts is the pattern's to say, and how many not."""
    if "E" in pattern and not args.num_experts:
        yield f"{flag} {pattern}: layers of E need --num-experts: add it, or use - in their place."
    if args.num_experts and "E" not in pattern:
        yield f"--num-experts {args.num_experts} is of layers of E, and {flag} {pattern} has none: leave it out, or use E."
    if args.moe_layer_freq != 1:
        yield f"--moe-layer-freq {args.moe_layer_freq} is not read with {flag}, whose E are layers of experts: leave it out."
    if other := args.mtp_hybrid_override_pattern:
        yield f"--mtp-hybrid-override-pattern {other} is an older name: leave it out, and give {flag} /{other} for each token."


def problems(args: Namespace) -> Iterator[str]:
    """Why such a model is not trained as asked, whatever machine it runs on."""
    flag, pattern = written_pattern(args)
    if pattern is None:
        return
    if args.transformer_impl == "local" and (other := "".join(sorted({*pattern} - {*LOCAL}))):
        yield (
            f"{flag} {pattern} with --transformer-impl local: of {' '.join(other)} there are no local modules: use "
            f"--transformer-impl transformer_engine, or layers of {' '.join(LOCAL[:-1])} alone."
        )
    if documents.asked(args) and (other := "".join(sorted({*pattern} - {*OF_DOCUMENTS}))):
        yield (
            f"{documents.flag_of(args)} with {flag} {pattern}: layers of {' '.join(other)} do not keep documents apart: leave "
            f"the former out, or use layers of {' '.join(OF_DOCUMENTS[:-1])} alone."
        )
    if getattr(args, "use_rope_scaling", False):
        yield "--use-rope-scaling is not heeded by Megatron's hybrid model: leave it out, or use --rotary-base or a yarn model."
    if getattr(args, "rotary_interleaved", False) and args.position_embedding_type == "rope":
        yield "--rotary-interleaved is half heeded by Megatron's hybrid model, which would rotate wrongly: leave it out."


def upstream_problem(args: Namespace) -> str | None:
    """What upstream's pretrain_hybrid.py, whose loop hands out the rows, does not do."""
    if not documents.asked(args):
        return None
    return (
        f"{documents.flag_of(args)} with --hybrid-layer-pattern is not done in upstream's pretrain_hybrid.py: use python -m "
        "megatron_lighthouse.pretrain_hybrid, or leave it out."
    )


def attention_problem(args: Namespace, attention: str) -> str | None:
    """Why there is no layer that takes the attention of `--attention`."""
    symbols = hybrid_pattern(args)
    if symbols is None or {*symbols} & {*ATTEND}:
        return None
    return (
        f"--attention {attention} with {written_pattern(args)[0]} {symbols}: none of its layers attends: use "
        f"{' or '.join(ATTEND)} for some, or leave --attention out."
    )


def missing_packages(args: Namespace) -> Iterator[str]:
    """What its layers need and this Python lacks."""
    for symbol, (module, package) in PACKAGES.items():
        if symbol in (hybrid_pattern(args) or "") and not find_spec(module):
            flag = written_pattern(args)[0]
            yield f"{flag}: layers of {symbol} need the package {package}, which is not installed: pip install {package}."
