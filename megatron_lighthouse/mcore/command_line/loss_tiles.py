"""How many tokens' logits a rank holds at once. Imports no Megatron."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

FLAG = "--loss-tile-tokens"
BYTES = 2**30
"""Of fp32 logits that a rank holds at once, unless it is told otherwise (ours)."""


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--loss-tile-tokens`."""
    parser.add_argument_group("loss").add_argument(
        FLAG,
        type=int,
        metavar="N",
        help="Tokens whose logits and loss a rank computes at once, and again in backward; 0: all. Default: all where their "
        f"fp32 logits take at most {BYTES // 2**30} GiB of the rank, else as many as do.",
    )
    return parser


def tile_tokens(given: int | None, vocabulary: int) -> int:
    """The most tokens whose logits a rank holds at once; 0: all there are.

    Args:
        given: `--loss-tile-tokens`.
        vocabulary: rows of the output weight that the rank has.
    """
    return max(1, BYTES // (4 * vocabulary)) if given is None else given


def problems(args: argparse.Namespace) -> Iterator[str]:
    """Why the loss cannot be taken as asked."""
    given = args.loss_tile_tokens
    if given is not None and given < 0:
        yield f"{FLAG} {given} must be at least 0: use a number of tokens, or 0 for all."
    if given and getattr(args, "defer_embedding_wgrad_compute", False):
        yield (
            f"{FLAG} {given} with --defer-embedding-wgrad-compute, which keeps the logits' gradients of whole micro-batches: "
            "leave one of them out."
        )
