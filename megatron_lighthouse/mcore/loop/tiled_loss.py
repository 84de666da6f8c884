"""The loss, one tile of the sequence at a time, so that only a tile's logits are held.

Megatron's own output layer and cross entropy compute each tile. So each token's loss is that of the whole, up to how products
of other sizes round. A tile's gradients are computed in forward, while its logits are there, for losses weighted as expected
(`loss_weights`). Backward multiplies them by the gradient that it is given; where that is no multiple of those weights, it
computes all again. Gradients of the output weight are summed over tiles in fp32, and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor

from megatron_lighthouse.mcore.command_line.tiles import LOSS, SHARDED, tile_tokens
from megatron_lighthouse.mcore.global_args import global_args
from megatron_lighthouse.mcore.loop import loss_weights
from megatron_lighthouse.notice import say_once
from megatron_lighthouse.once import once_differentiable
from megatron_lighthouse.sums import accumulation_dtype

Loss = Callable[[Tensor, Tensor], Tensor]
"""Megatron's compute_language_model_loss: labels [b, n] and logits [n, b, V/tp] -> [b, n], fp32, in nats."""
Scale = Callable[[Tensor], Tensor]

surprised: WeakSet[Any] = WeakSet()
"""Output layers of whose losses a gradient was not as expected: from then on theirs are left to backward."""


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


class Taken(NamedTuple):
    """What a pass over the tiles gives."""

    losses: Tensor
    """[b, s]"""
    of_hidden: Tensor | None
    """[s/ranks, b, h]"""
    of_weight: Tensor | None
    """[V/tp, h], in fp32 or what is more."""


@dataclass(frozen=True)
class Output:
    """The model's last layer, a tile at a time."""

    layer: Any
    scale: Scale
    """Of all logits, as maximal update parametrization has it."""
    tokens: int
    """The most in a tile."""

    def of(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Logits of a tile."""
        logits, _ = self.layer(hidden, weight=weight)
        return self.scale(logits)

    def take(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, compute: Loss, weights: Tensor | None, of: tuple[bool, bool]
    ) -> Taken:
        """Losses, and gradients of their sum by `weights` [b, s]: of `hidden`, of `weight`, as `of` asks."""
        of_hidden = torch.empty_like(hidden, requires_grad=False) if of[0] else None
        of_weight: Tensor | None = None
        losses, row = [], 0
        for part, wanted, by in tiles(hidden, (labels, labels if weights is None else weights), self.tokens):
            given = [x.detach().requires_grad_(needed) for x, needed in zip((part, weight), of, strict=True)]
            with torch.set_grad_enabled(any(of)), _unfused(self.layer):
                loss = compute(wanted, self.of(*given))
                needed = [x for x in given if x.requires_grad]
                grads = [*torch.autograd.grad(loss, needed, by.to(loss.dtype))] if needed else []
            losses.append(loss.detach())
            if of_hidden is not None:
                of_hidden[row : row + len(part)] = grads.pop(0)
            if grads:
                of_weight = _plus(of_weight, grads.pop())
            row += len(part)
        return Taken(joined(losses, labels.shape[1] // len(hidden)), of_hidden, of_weight)


def _plus(total: Tensor | None, grad: Tensor) -> Tensor:
    return grad.to(accumulation_dtype(grad)) if total is None else total.add_(grad)


@contextmanager
def _unfused(layer: Any) -> Iterator[None]:
    """While it lasts, the layer hands its weight's gradient back, and does not add it to Megatron's `main_grad`."""
    before, layer.gradient_accumulation_fusion = layer.gradient_accumulation_fusion, False
    try:
        yield
    finally:
        layer.gradient_accumulation_fusion = before


class _TiledLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        hidden, weight, labels, weights, output, compute = given
        ctx.save_for_backward(hidden, weight, labels, weights)
        ctx.output, ctx.compute, ctx.taken = output, compute, None
        if _late(hidden, output.layer):
            losses: Tensor = output.take(hidden, weight, labels, compute, None, (False, False)).losses
            return losses
        ctx.taken = output.take(hidden, weight, labels, compute, weights, ctx.needs_input_grad[:2])
        return ctx.taken.losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, weights = ctx.saved_tensors
        taken, ctx.taken = ctx.taken, None  # scaled in place, it serves once
        factor = None if taken is None else loss_weights.multiple(grads[0], weights)
        if taken is not None and factor is None:
            surprised.add(ctx.output.layer)
            say_once("lighthouse: losses are not weighted by the loss mask: from now on tiles of logits are computed twice.")
        if factor is None:
            taken, factor = ctx.output.take(hidden, weight, labels, ctx.compute, grads[0], ctx.needs_input_grad[:2]), 1.0
        of = [x if x is None or factor == 1 else x.mul_(factor) for x in (taken.of_hidden, taken.of_weight)]
        return of[0], None if of[1] is None else of[1].to(weight.dtype), None, None, None, None


def _late(hidden: Tensor, layer: Any) -> bool:
    """Whether gradients are left to backward: fp16 needs its scale of the loss, and in a captured graph nothing is compared."""
    if hidden.dtype == torch.float16:
        say_once("lighthouse: in fp16 tiles of logits are computed twice, the second time when the scale of the loss is known.")
        return True
    captured = hidden.is_cuda and torch.cuda.is_current_stream_capturing()
    return captured or layer in surprised


@dataclass(frozen=True)
class Logits:
    """Stands for logits [s, b, V/tp] that are not made: what makes those of a tile."""

    hidden: Tensor
    """[s/ranks, b, h]"""
    weight: Tensor
    output: Output

    def loss(self, labels: Tensor, compute: Loss, weights: Tensor) -> Tensor:
        """[b, s] labels -> [b, s] losses, which are expected to be summed by a multiple of `weights` [b, s]."""
        if torch.is_grad_enabled() and (self.hidden.requires_grad or self.weight.requires_grad):
            loss: Tensor = _TiledLoss.apply(self.hidden, self.weight, labels, weights, self.output, compute)
            return loss
        return self.output.take(self.hidden, self.weight, labels, compute, None, (False, False)).losses

    def counts(self, labels: Tensor, mask: Tensor, count: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """How many of a multi-token-prediction layer's guesses are right, and of how many."""
        with torch.no_grad():
            cut = tiles(self.hidden, (labels, mask), self.output.tokens)
            found = [count(self.output.of(part, self.weight), *others) for part, *others in cut]
        right, total = (torch.stack(numbers).sum() for numbers in zip(*found, strict=True))
        return right, total


class Unmade:
    """Stands for an output layer: its logits are made when their loss is asked for."""

    def __init__(self, output: Output) -> None:
        self.output = output

    def __call__(self, hidden: Tensor, weight: Tensor | None = None, **_: Any) -> tuple[Logits, None]:
        """The weight is a tied one, or the layer's own."""
        return Logits(hidden, self.output.layer.weight if weight is None else weight, self.output), None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.output.layer, name)


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
    for name, flag in SHARDED.items():
        if getattr(global_args(), name, False):
            say_once(f"lighthouse: {flag} shards the output layer: the loss is not taken in tiles, and all logits are held.")
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
    compute, output = model.compute_language_model_loss, Output(layer, model._scale_logits, tokens)

    def loss(labels: Tensor, logits: Any) -> Tensor:
        if not isinstance(logits, Logits):
            return compute(labels, logits)
        return logits.loss(labels, compute, loss_weights.expected(labels, named.get("loss_mask")))

    # the model's own attributes are hidden while it runs: what stands for its output layer has no weights of its own
    stands = {"output_layer": Unmade(output), "compute_language_model_loss": loss, "_scale_logits": lambda x: x}
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
    return logits.counts(labels, mask, lambda part, *of_tokens: inner(part, *of_tokens, logits.output.layer, *more))
