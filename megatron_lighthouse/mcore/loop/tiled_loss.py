"""The loss, a tile of the sequence at a time: logits of a tile alone are there, and are made again in backward.

Megatron's own output layer and cross entropy make them, so each token's loss is that of the whole, but for what a product of
other sizes rounds. Backward takes one product more. Gradients of the output weight are summed over tiles in fp32, and rounded
once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_lighthouse.mcore.command_line.tiles import LOSS, tile_tokens
from megatron_lighthouse.mcore.global_args import global_args
from megatron_lighthouse.mcore.loop.summed import Summed, apart
from megatron_lighthouse.notice import say_once

Loss = Callable[[Tensor, Tensor], Tensor]
"""Megatron's compute_language_model_loss: labels [b, n] and logits [n, b, V/tp] -> [b, n], fp32, in nats."""
Scale = Callable[[Tensor], Tensor]


def tiles(hidden: Tensor, of_tokens: tuple[Tensor, ...], tokens: int) -> Iterator[tuple[Tensor, ...]]:
    """Cut along the sequence.

    Args:
        hidden: [s/ranks, b, h]; with sequence parallelism each of the ranks has as many tokens of every tile.
        of_tokens: each [b, s], of all those ranks.
        tokens: the most in a tile, of all sequences together.

    Yields:
        hidden of a tile [n/ranks, b, h], and of each of the others [b, n] in the order in which the output layer gathers them.
    """
    rows = hidden.shape[0]
    together = of_tokens[0].numel() // rows  # tokens that one row of every rank and sequence makes
    count = -(-rows // max(1, tokens // together))
    cut = (x.unflatten(1, (-1, rows)).tensor_split(count, dim=2) for x in of_tokens)
    for part, *others in zip(hidden.tensor_split(count), *cut, strict=True):
        yield part, *(x.flatten(1) for x in others)


def joined(parts: list[Tensor], ranks: int) -> Tensor:
    """[b, n] of each tile -> [b, s], in the order of the sequence: what `tiles` cut."""
    return torch.cat([x.unflatten(1, (ranks, -1)) for x in parts], dim=2).flatten(1)


@dataclass(frozen=True)
class Logits:
    """Stands for logits [s, b, V/tp] that are not made: what makes those of a tile."""

    hidden: Tensor
    """[s/ranks, b, h]"""
    layer: Any
    weight: Tensor | None
    scale: Scale
    """Of all logits, as maximal update parametrization has it."""
    tokens: int

    @property
    def given(self) -> Tensor:
        """The weight: a tied one, or the layer's own."""
        return self.layer.weight if self.weight is None else self.weight

    def of(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Those of a tile."""
        logits, _ = self.layer(hidden, weight=weight)
        return self.scale(logits)

    def loss(self, labels: Tensor, compute: Loss) -> Tensor:
        """[b, s] labels -> [b, s] losses."""

        def of_tile(hidden: Tensor, weight: Tensor, wanted: Tensor) -> Tensor:
            return compute(wanted, self.of(hidden, weight))

        cut = [*tiles(self.hidden, (labels,), self.tokens)]
        weight = Summed(self.given, len(cut), self.layer.gradient_accumulation_fusion)
        parts = [apart(of_tile, hidden, weight.use(), wanted) for hidden, wanted in cut]
        return joined(parts, labels.shape[1] // len(self.hidden))

    def counts(self, labels: Tensor, mask: Tensor, count: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """How many of a multi-token-prediction layer's guesses are right, and of how many."""
        with torch.no_grad():
            found = [
                count(self.of(part, self.given), *others) for part, *others in tiles(self.hidden, (labels, mask), self.tokens)
            ]
        right, total = (torch.stack(numbers).sum() for numbers in zip(*found, strict=True))
        return right, total


class Unmade:
    """Stands for an output layer: its logits are made when their loss is asked for."""

    def __init__(self, layer: Any, scale: Scale, tokens: int) -> None:
        self.layer, self.scale, self.tokens = layer, scale, tokens

    def __call__(self, hidden: Tensor, weight: Tensor | None = None, **_: Any) -> tuple[Logits, None]:
        return Logits(hidden, self.layer, weight, self.scale, self.tokens), None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


def at_once(layer: Any, labels: Tensor, deferred: bool) -> int:
    """Tokens of a tile; 0: all are taken at once.

    Args:
        deferred: whether the gradient of the output weight waits for the logits of whole micro-batches.
    """
    found = tile_tokens(getattr(global_args(), "loss_tile_tokens", 0), layer.output_size_per_partition)
    if not found or labels.numel() <= found:
        return 0
    if deferred:
        say_once(f"lighthouse: --defer-embedding-wgrad-compute keeps all logits: the loss is not taken in tiles ({LOSS}).")
        return 0
    return found


def forward(inner: Callable[..., Tensor], model: Any, *given: Any, labels: Tensor | None = None, **named: Any) -> Tensor:
    """In place of the `forward` of Megatron's models, which make the logits and their loss, multi-token prediction's too."""
    layer = getattr(model, "output_layer", None)
    tokens = 0
    if model.post_process and labels is not None:
        tokens = at_once(layer, labels, model.config.defer_embedding_wgrad_compute)
    if not tokens:
        return inner(model, *given, labels=labels, **named)
    compute, scale = model.compute_language_model_loss, model._scale_logits

    def loss(labels: Tensor, logits: Any) -> Tensor:
        return logits.loss(labels, compute) if isinstance(logits, Logits) else compute(labels, logits)

    # the model's own attributes are hidden while it runs: what stands for its output layer has no weights of its own
    stands = {"output_layer": Unmade(layer, scale, tokens), "compute_language_model_loss": loss, "_scale_logits": lambda x: x}
    vars(model).update(stands)
    try:
        return inner(model, *given, labels=labels, **named)
    finally:
        for name in stands:
            del vars(model)[name]


def mtp_counts(inner: Callable[..., Any], logits: Any, labels: Tensor, mask: Tensor, layer: Any, *more: Any) -> Any:
    """In place of `_compute_mtp_acceptance_counts`."""
    if not isinstance(logits, Logits):
        return inner(logits, labels, mask, layer, *more)
    return logits.counts(labels, mask, lambda part, *of_tokens: inner(part, *of_tokens, logits.layer, *more))
