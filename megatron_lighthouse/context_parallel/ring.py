"""Ring: in step i each rank attends to the keys and values of the rank i places before it, while the next ones travel.

They come straight from the rank that holds them, and only the half that will be read: of a lower rank the early chunk. In
backward they come again, and the gradients of keys and values go straight back to their rank, which sums them: no partial sum
is rounded on its way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_lighthouse.context_parallel.blocks import Block
from megatron_lighthouse.context_parallel.exchange import Exchange, finish
from megatron_lighthouse.context_parallel.merge import merge


class Ring(torch.autograd.Function):
    """(query, key, value, block, exchange, scale) -> output."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, block: Block, exchange: Exchange, scale: float) -> Tensor:
        ctx.block, ctx.exchange, ctx.scale = block, exchange, scale
        arriving = _arriving(key, value, exchange)
        next(arriving)
        out, lse = block.forward(query, key, value, True, scale)
        dtype, several = out.dtype, exchange.size > 2
        out = out.to(lse.dtype) if several else out  # what is merged once is rounded once
        for rank, k, v in arriving:
            rows = _rows(rank, exchange.rank, query)
            merge(out[rows], lse[..., rows], *block.forward(query[rows], k, v, False, scale))
        out = out.to(dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        exchange: Exchange = ctx.exchange
        arriving = _arriving(key, value, exchange)
        next(arriving)
        dq, dk, dv = ctx.block.backward(grad, query, key, value, out, lse, True, ctx.scale)
        sums = torch.promote_types(dq.dtype, torch.float32) if exchange.size > 2 else dq.dtype
        dq, dk, dv = dq.to(sums), dk.to(sums), dv.to(sums)
        returning = _Returning(dk, dv, exchange, key.dtype)
        for rank, k, v in arriving:
            rows = _rows(rank, exchange.rank, query)
            given = (grad[rows], query[rows], k, v, out[rows], lse[..., rows])
            part_q, part_k, part_v = ctx.block.backward(*given, False, ctx.scale)
            returning.send(rank, part_k, part_v)
            dq[rows] += part_q
        returning.add()
        return dq.to(query.dtype), dk.to(key.dtype), dv.to(key.dtype), None, None, None


def _rows(rank: int, own: int, x: Tensor) -> slice:
    """The rows of rank `own` that attend to keys of `rank`: all to its early chunk if it is lower, else the late chunk."""
    return slice(None) if rank < own else slice(x.shape[0] // 2, None)


def _seen(rank: int, by: int, x: Tensor) -> slice:
    """The rows of `rank` that rank `by` attends to: the early chunk if it is lower, else all."""
    return slice(None, x.shape[0] // 2) if rank < by else slice(None)


def _arriving(key: Tensor, value: Tensor, exchange: Exchange) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The other ranks' keys and values, in ring order; each is under way while the one before it is used.

    The first item is this rank's own: what follows it is then already under way.
    """
    key, value = key.contiguous(), value.contiguous()

    def begin(step: int) -> tuple[int, Tensor, Tensor, list[Any]]:
        to, by = (exchange.rank + step) % exchange.size, (exchange.rank - step) % exchange.size
        rows, seen = _seen(exchange.rank, to, key), _seen(by, exchange.rank, key)
        k, v = torch.empty_like(key[seen]), torch.empty_like(value[seen])
        return by, k, v, exchange.start([(key[rows], to), (value[rows], to)], [(k, by), (v, by)], "attend")

    following = begin(1)
    yield exchange.rank, key, value
    for step in range(2, exchange.size + 1):
        rank, k, v, works = following
        finish(works)
        if step < exchange.size:
            following = begin(step)
        yield rank, k, v


class _Returning:
    """Gradients of keys and values on their way back to the ranks that hold these."""

    def __init__(self, dk: Tensor, dv: Tensor, exchange: Exchange, dtype: torch.dtype) -> None:
        self.grads, self.exchange, self.dtype = (dk, dv), exchange, dtype
        self.step = 0
        self.under_way: tuple[slice, list[Tensor], list[Any], Any] | None = None

    def send(self, rank: int, part_k: Tensor, part_v: Tensor) -> None:
        """Send this step's gradients to `rank`, and add those that the step before brought."""
        self.add()
        self.step += 1
        by = (self.exchange.rank + self.step) % self.exchange.size
        rows = _seen(self.exchange.rank, by, self.grads[0])
        received = [torch.empty_like(x[rows], dtype=self.dtype, memory_format=torch.contiguous_format) for x in self.grads]
        parts = part_k.contiguous(), part_v.contiguous()
        works = self.exchange.start([(x, rank) for x in parts], [(x, by) for x in received], "attend")
        self.under_way = rows, received, works, parts

    def add(self) -> None:
        """Add what is under way to this rank's own."""
        if self.under_way is not None:
            rows, received, works, _ = self.under_way
            finish(works)
            for total, part in zip(self.grads, received, strict=True):
                total[rows] += part
            self.under_way = None
