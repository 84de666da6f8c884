"""All-gather: collect the keys and values of all ranks, then attend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.softmax.blocks import Block
from megatron_lighthouse.softmax.merge import merge


class Gathered(torch.autograd.Function):
    """(query, key, value, block, exchange, scale) -> output. The gradients of keys and values go back by all-to-all."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, block: Block, exchange: Exchange, scale: float) -> Tensor:
        ctx.block, ctx.exchange, ctx.scale = block, exchange, scale
        keys, values = (exchange.all_gather(x, "attend") for x in (key, value))
        out, lse = block.forward(query, key, value, True, scale)
        dtype, parts = out.dtype, list(_parts(keys, values, exchange.rank))
        out = out.to(lse.dtype) if len(parts) > 1 else out  # what is merged once is rounded once
        for _, rows, k, v in parts:
            merge(out[rows], lse[..., rows], *block.forward(query[rows], k, v, False, scale))
        out = out.to(dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        exchange: Exchange = ctx.exchange
        keys, values = (exchange.all_gather(x, "attend") for x in (key, value))
        dq, dk, dv = ctx.block.backward(grad, query, key, value, out, lse, True, ctx.scale)
        wide = torch.promote_types(dq.dtype, torch.float32)
        dq, d_keys, d_values = dq.to(wide), torch.zeros_like(keys), torch.zeros_like(values)
        for i, rows, k, v in _parts(keys, values, exchange.rank):
            given = (grad[rows], query[rows], k, v, out[rows], lse[..., rows])
            part_q, part_k, part_v = ctx.block.backward(*given, False, ctx.scale)
            dq[rows] += part_q
            for whole, part in ((d_keys, part_k), (d_values, part_v)):
                target = _seen(whole, exchange.rank)[i]
                target.copy_(part.unflatten(0, target.shape[:2]))
        shares = (exchange.all_to_all(x.flatten(0, 1), "attend").unflatten(0, (exchange.size, -1)) for x in (d_keys, d_values))
        sums = ((x.sum(0, dtype=wide) + d).to(d.dtype) for x, d in zip(shares, (dk, dv), strict=True))
        return dq.to(query.dtype), *sums, None, None, None


def _seen(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Of the rows [C, 2s, ...] of all ranks: those that all rows of `rank` attend to, and those that its late rows do.

    The former are the early chunks of the ranks before it, the latter all rows of the ranks after it. Their order does not
    matter, for none of them is masked.
    """
    return x[:rank, : x.shape[1] // 2], x[rank + 1 :]


def _parts(keys: Tensor, values: Tensor, rank: int) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
    """The parts of `_seen` that are not empty: number, the rows of `rank` that attend to it, its keys and values."""
    rows = (slice(None), slice(keys.shape[1] // 2, None))
    for i, (k, v) in enumerate(zip(_seen(keys, rank), _seen(values, rank), strict=True)):
        if len(k):
            yield i, rows[i], k.flatten(0, 1), v.flatten(0, 1)
