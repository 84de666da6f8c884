"""`--loss-tile-tokens` and `--mlp-tile-tokens`: for how many tokens logits and an MLP's activations are held. No Megatron."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator

from megatron_lighthouse.options import as_words

LOSS, MLP = "--loss-tile-tokens", "--mlp-tile-tokens"
BYTES = 2**30
"""Of fp32 logits that a rank holds at once, unless it is told otherwise (ours)."""

MLP_BYTES = 3 * 2**30
"""Of what an MLP holds of a tile in backward, where tiles are recommended (ours): larger ones are no faster."""

SHARDED = {"use_torch_fsdp2": "--use-torch-fsdp2", "use_megatron_fsdp": "--use-megatron-fsdp"}
"""Which shard the output layer: its weight is whole within its own forward alone, where a tile's loss would need it."""

WITHOUT_MLP_TILES = {
    "fp8": "its scales would be recorded again with each tile",
    "fp4": "its scales would be recorded again with each tile",
    "delay_wgrad_compute": "gradients of weights would wait for whole micro-batches",
    "tp_comm_overlap": "its buffers are of whole sequences",
    "use_transformer_engine_op_fuser": "its MLP is one operator",
    "cuda_graph_impl": "not tried in a graph",
}
"""Megatron's arguments that do not go with tiles of the MLP, and why."""


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--loss-tile-tokens` and `--mlp-tile-tokens`."""
    parser.add_argument_group("loss").add_argument(
        LOSS,
        type=int,
        metavar="N",
        help="Tokens whose logits, loss and gradients a rank computes at once; 0: all. Default: all where their "
        f"fp32 logits take at most {BYTES // 2**30} GiB of the rank, else as many as do.",
    )
    parser.add_argument_group("mlp").add_argument(
        MLP,
        type=int,
        default=0,
        metavar="N",
        help="Tokens of which a rank holds what an MLP computes, made again in backward. Default 0: of all, kept.",
    )
    return parser


def tile_tokens(given: int | None, vocabulary: int) -> int:
    """The most tokens whose logits a rank holds at once; 0: all there are.

    Args:
        given: `--loss-tile-tokens`.
        vocabulary: rows of the output weight that the rank has.
    """
    return max(1, BYTES // (4 * vocabulary)) if given is None else given


def mlp_tile_tokens(ffn: int) -> int:
    """Tokens of a tile to recommend: a power of two, of whose six FFN rows in bf16 a rank holds at most MLP_BYTES.

    Args:
        ffn: columns of the gate, and of the up projection, that the rank has.
    """
    return int(2 ** math.floor(math.log2(max(1, MLP_BYTES // (12 * ffn)))))


def problems(args: argparse.Namespace) -> Iterator[str]:
    """Why the loss or the MLPs cannot be taken as asked."""
    given, mlp = getattr(args, "loss_tile_tokens", None), getattr(args, "mlp_tile_tokens", 0)
    for flag, value in ((LOSS, given), (MLP, mlp)):
        if value is not None and value < 0:
            yield f"{flag} {value} must be at least 0: use a number of tokens, or 0 for all."
    if given and getattr(args, "defer_embedding_wgrad_compute", False):
        yield (
            f"{LOSS} {given} with --defer-embedding-wgrad-compute, which keeps the logits' gradients of whole micro-batches: "
            "leave one of them out."
        )
    for name, flag in SHARDED.items():
        if given and getattr(args, name, False):
            yield f"{LOSS} {given} with {flag}, which shards the output layer: use {LOSS} 0, or leave {flag} out."
    for name, because in WITHOUT_MLP_TILES.items():
        if mlp and (value := getattr(args, name, None)) and value != "none":
            other = f"--{name.replace('_', '-')}" + ("-format" if name in ("fp8", "fp4") else "")
            yield f"{MLP} {mlp} with {as_words(other, value)}: {because}: leave one of them out."
