"""All-to-all: exchange a shard of rows of all heads for all rows of a shard of heads, attend, and exchange back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.context_parallel.parts import Tensors
from megatron_lighthouse.once import once_differentiable

Way = Callable[[Tensor, Exchange], Tensor]


@dataclass(frozen=True)
class ByHeads:
    """Attention over shards by all-to-all: see `Scheme`."""

    whole: Callable[..., Tensor]
    """Attends to all 2sC rows, in the order of the sequence, of 1/C of the heads: of near, far, and sinks where there are."""
    exchange: Exchange

    def __call__(self, near: Tensors, far: Tensors, sinks: Tensor | None = None) -> Tensor:
        near, far = (tuple(_ByHeads.apply(x, self.exchange, to_heads, to_rows) for x in rows) for rows in (near, far))
        own = () if sinks is None else (sinks.unflatten(0, (self.exchange.size, -1))[self.exchange.rank],)
        out: Tensor = _ByHeads.apply(self.whole(near, far, *own), self.exchange, to_rows, to_heads)
        return out


def to_heads(x: Tensor, exchange: Exchange) -> Tensor:
    """[2s, B, H, D], in zigzag order, -> [2sC, B, H/C, D], in the order of the sequence."""
    shares = x.unflatten(2, (exchange.size, -1)).movedim(2, 0).flatten(0, 1)
    return exchange.in_order(exchange.all_to_all(shares, "attend").unflatten(0, (exchange.size, -1)))


def to_rows(x: Tensor, exchange: Exchange) -> Tensor:
    """[2sC, B, H/C, D] -> [2s, B, H, D]: the way back."""
    shares = exchange.all_to_all(exchange.out_of_order(x).flatten(0, 1), "attend")
    return shares.unflatten(0, (exchange.size, -1)).movedim(0, 2).flatten(2, 3)


def share_of_heads(x: Tensor, size: int) -> Tensor:
    """A view of as many heads of [·, ·, H, ·] as each of `size` ranks attends with."""
    return x[:, :, : x.shape[2] // size]


class _ByHeads(torch.autograd.Function):
    """(rows, exchange, the way there, the way back): one of the above, and the other for gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange, there: Way, back: Way) -> Tensor:
        ctx.exchange, ctx.back = exchange, back
        return there(x, exchange)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.back(grad, ctx.exchange), None, None, None
