"""Sizes that tensor-parallel ranks share out evenly, and that Megatron asserts once a layer is built or called.

Heads are the layout's to check. Imports no Megatron.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator

from megatron_lighthouse.mcore.command_line.layers import written_pattern
from megatron_lighthouse.nearest import around, either, multiples, offers
from megatron_lighthouse.usage import as_flag
from megatron_lighthouse.variants import VARIANTS


def problems(args: argparse.Namespace) -> Iterator[str]:
    """Widths of the MLP, and with --sequence-parallel the tokens.

    Args:
        args: as the words say, not validated.
    """
    yield from _widths(args)
    length, context = args.seq_length or args.encoder_seq_length, args.context_parallel_size
    if length and length % (unit := tokens(args, context)):
        every = math.lcm(unit, 2 * context if context > 1 else 1)
        most, world = args.max_position_embeddings or length, getattr(args, "world_size", None)
        alone = args.tensor_model_parallel_size * args.pipeline_model_parallel_size

        def fits(ranks: int) -> bool:
            shared = length % math.lcm(tokens(args, ranks), 2 * ranks if ranks > 1 else 1) == 0
            return shared and (world or alone * ranks) % (alone * ranks) == 0

        sizes = around(context, fits, 2 * context)
        lengths = multiples(length, every, lambda n: n <= most)
        by_attention = VARIANTS[args.attention].selects and sizes  # which has rules of its own for lengths
        near = {"--context-parallel-size": sizes, "--seq-length": [] if by_attention else lengths}
        yield (
            f"--seq-length {length} must be a multiple of {unit} with --sequence-parallel, --tensor-model-parallel-size "
            f"{args.tensor_model_parallel_size} and --context-parallel-size {context}, whose ranks share out the tokens: use "
            f"{offers(near)}."
        )


def tokens(args: argparse.Namespace, context: int) -> int:
    """What a sequence is a multiple of, on so many context-parallel ranks, so that tensor-parallel ones share out its parts."""
    tensor = args.tensor_model_parallel_size
    return tensor * context if getattr(args, "sequence_parallel", False) and tensor > 1 else 1


def _widths(args: argparse.Namespace) -> Iterator[str]:
    tensor, width, own = args.tensor_model_parallel_size, args.ffn_hidden_size, args.moe_ffn_hidden_size
    of_experts = args.expert_tensor_parallel_size or tensor
    ranks = (tensor, f"{tensor} tensor-parallel ranks")
    halved = (2 * tensor, f"{ranks[1]}, each with halves for --swiglu")
    experts = (of_experts, f"{of_experts} tensor-parallel ranks of experts")
    # Megatron's warm-up of its fusions halves a rank's part, be it no layer's
    warmed = args.swiglu and width and width // tensor % 2 == 1
    shared = [halved if args.swiglu else ranks] if warmed or _some_are_dense(args) else []
    yield from _width("ffn_hidden_size", width, *shared, *([experts] if args.num_experts and not own else []))
    if args.num_experts:
        yield from _width("moe_ffn_hidden_size", own, experts)
        yield from _width("moe_shared_expert_intermediate_size", args.moe_shared_expert_intermediate_size, ranks)


def _some_are_dense(args: argparse.Namespace) -> bool:
    """Whether a layer has an MLP without experts."""
    if pattern := written_pattern(args)[1]:
        return "-" in pattern
    every = args.moe_layer_freq
    return not args.num_experts or (0 in every if isinstance(every, list) else every > 1)


def _width(name: str, width: int | None, *shares: tuple[int, str]) -> Iterator[str]:
    """A width that is no multiple of what shares it out: numbers, with the words for them."""
    if not width or width % (unit := math.lcm(*(number for number, _ in shares))) == 0:
        return
    by = " and ".join(words for _, words in shares)
    yield f"{as_flag(name)} {width} must be a multiple of {unit} ({by}): use {either(multiples(width, unit))}."
