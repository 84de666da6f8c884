"""Sizes that tensor-parallel ranks share out evenly, and that Megatron asserts once a layer is built or called.

Heads are the layout's to check. Imports no Megatron.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator


def problems(args: argparse.Namespace) -> Iterator[str]:
    """Widths of the MLP, and with --sequence-parallel the tokens.

    Args:
        args: as the words say, not validated.
    """
    tensor = args.tensor_model_parallel_size
    of_experts = args.expert_tensor_parallel_size or tensor
    halves = 2 if args.swiglu else 1  # Megatron's warm-up of its fusions halves a rank's part
    yield from _width("ffn_hidden_size", args.ffn_hidden_size, tensor, halves)
    if args.num_experts:
        yield from _width("moe_ffn_hidden_size", args.moe_ffn_hidden_size, of_experts, 1)
        yield from _width("moe_shared_expert_intermediate_size", args.moe_shared_expert_intermediate_size, tensor, 1)
    length, context = args.seq_length or args.encoder_seq_length, args.context_parallel_size
    if length and length % (unit := tokens(args, context)):
        every = math.lcm(unit, 2 * context if context > 1 else 1)
        yield (
            f"--seq-length {length} must be a multiple of {unit} with --sequence-parallel, --tensor-model-parallel-size "
            f"{tensor} and --context-parallel-size {context}, whose ranks share out the tokens: use "
            f"{max(1, length // every) * every}."
        )


def tokens(args: argparse.Namespace, context: int) -> int:
    """What a sequence is a multiple of, on so many context-parallel ranks, so that tensor-parallel ones share out its parts."""
    tensor = args.tensor_model_parallel_size
    return tensor * context if getattr(args, "sequence_parallel", False) and tensor > 1 else 1


def _width(name: str, width: int | None, ranks: int, halves: int) -> Iterator[str]:
    if not width or width % (unit := halves * ranks) == 0:
        return
    by = f"{ranks} tensor-parallel ranks" + (", each with halves for --swiglu" if halves == 2 else "")
    fits = " or ".join(str(n) for n in (width // unit * unit, -(-width // unit) * unit) if n)
    yield f"--{name.replace('_', '-')} {width} must be a multiple of {unit} ({by}): use {fits}."
