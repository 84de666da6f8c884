"""All-to-all: exchange a shard of rows of all heads for all rows of a shard of heads, attend, and exchange back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.context_parallel.parts import Tensors


@dataclass(frozen=True)
class ByHeads:
    """Attention over shards by all-to-all: see `Scheme`."""

    whole: Callable[..., Tensor]
    """Attends to all 2sC rows, in the order of the sequence, of 1/C of the heads: of near, far, and sinks where there are."""
    exchange: Exchange

    def __call__(self, near: Tensors, far: Tensors, sinks: Tensor | None = None) -> Tensor:
        near, far = (tuple(_ToHeads.apply(x, self.exchange) for x in rows) for rows in (near, far))
        own = () if sinks is None else (sinks.unflatten(0, (self.exchange.size, -1))[self.exchange.rank],)
        out: Tensor = _ToRows.apply(self.whole(near, far, *own), self.exchange)
        return out


def to_heads(x: Tensor, exchange: Exchange) -> Tensor:
    """[2s, B, H, D], in zigzag order, -> [2sC, B, H/C, D], in the order of the sequence."""
    shares = x.unflatten(2, (exchange.size, -1)).movedim(2, 0).flatten(0, 1)
    return exchange.in_order(exchange.all_to_all(shares, "attend").unflatten(0, (exchange.size, -1)))


def to_rows(x: Tensor, exchange: Exchange) -> Tensor:
    """[2sC, B, H/C, D] -> [2s, B, H, D]: the way back."""
    shares = exchange.all_to_all(exchange.out_of_order(x).flatten(0, 1), "attend")
    return shares.unflatten(0, (exchange.size, -1)).movedim(0, 2).flatten(2, 3)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return to_heads(x, exchange)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return to_rows(grad, ctx.exchange), None


class _ToRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return to_rows(x, exchange)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return to_heads(grad, ctx.exchange), None
