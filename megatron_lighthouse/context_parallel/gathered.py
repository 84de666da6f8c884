"""All-gather: collect the far rows of all ranks, then attend."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.context_parallel.parts import Block, Mask, Tensors, saved_in, sinks_gradient
from megatron_lighthouse.once import once_differentiable
from megatron_lighthouse.sequence.layout import Layout
from megatron_lighthouse.sums import accumulation_dtype


@dataclass(frozen=True)
class Gathered:
    """Attention over shards by all-gather: see `Scheme`. The gradients of far rows go back by all-to-all."""

    block: Block
    exchange: Exchange

    def __call__(self, near: Tensors, far: Tensors, sinks: Tensor | None = None) -> Tensor:
        out: Tensor = _Gathered.apply(self, sinks, len(near), *near, *far)
        return out

    @property
    def own(self) -> Mask:
        return Mask(self.exchange.layout.chunks, self.exchange.layout.chunks)

    def parts(self, wholes: Tensors) -> Iterator[tuple[int, slice, Tensors, Mask]]:
        """The parts of `_seen` that are not empty: number, the near rows that attend to it, its far rows, and their mask."""
        size, rank, own = self.exchange.size, self.exchange.rank, self.exchange.layout.chunks
        rows = (slice(None), slice(wholes[0].shape[1] // 2, None))
        after = tuple(chunk for other in range(rank + 1, size) for chunk in Layout(size, other).chunks)
        masks = Mask(own, tuple(range(rank))), Mask(own[1:], after)
        for i, parts in enumerate(zip(*(_seen(x, rank) for x in wholes), strict=True)):
            if len(parts[0]):
                yield i, rows[i], tuple(x.flatten(0, 1) for x in parts), masks[i]


class _Gathered(torch.autograd.Function):
    """(scheme, sinks or None, number of near tensors, *near, *far) -> output."""

    @staticmethod
    def forward(ctx: Any, scheme: Gathered, sinks: Tensor | None, count: int, *rows: Tensor) -> Tensor:
        near, far = rows[:count], rows[count:]
        ctx.scheme, ctx.near, ctx.far = scheme, len(near), len(far)
        wholes = tuple(scheme.exchange.all_gather(x, "attend") for x in far)
        part = scheme.block.forward(near, far, scheme.own)
        dtypes, others = part.dtypes, list(scheme.parts(wholes))
        several = len(others) > 1 or sinks is not None  # what is merged once is rounded once
        part = part.to(*[part.lse.dtype] * len(dtypes)) if several else part
        for _, seeing, theirs, mask in others:
            part[seeing].merge(scheme.block.forward(tuple(x[seeing] for x in near), theirs, mask))
        part = part.with_sinks(sinks).to(*dtypes)
        ctx.save_for_backward(*near, *far, *part.averages, part.lse, sinks)
        return scheme.block.output(part)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *saved, sinks = ctx.saved_tensors
        scheme: Gathered = ctx.scheme
        near, far, part = saved_in(saved, ctx.near, ctx.far)
        exchange: Exchange = scheme.exchange
        wholes = tuple(exchange.all_gather(x, "attend") for x in far)
        d_near, d_far = scheme.block.backward(grad, near, far, part, scheme.own)
        wide = accumulation_dtype(grad)
        sums, d_wholes = [x.to(wide) for x in d_near], [torch.zeros_like(x) for x in wholes]
        for i, rows, theirs, mask in scheme.parts(wholes):
            given = grad[rows], tuple(x[rows] for x in near), theirs, part[rows]
            parts_near, parts_far = scheme.block.backward(*given, mask)
            for total, x in zip(sums, parts_near, strict=True):
                total[rows] += x
            for whole, x in zip(d_wholes, parts_far, strict=True):
                target = _seen(whole, exchange.rank)[i]
                target.copy_(x.unflatten(0, target.shape[:2]))
        shares = (exchange.all_to_all(x.flatten(0, 1), "attend").unflatten(0, (exchange.size, -1)) for x in d_wholes)
        totals = ((x.sum(0, dtype=wide) + d).to(d.dtype) for x, d in zip(shares, d_far, strict=True))
        d_sinks = sinks_gradient(sinks, grad, scheme.block.output(part), part.lse)
        return None, d_sinks, None, *(x.to(like.dtype) for x, like in zip(sums, near, strict=True)), *totals


def _seen(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Of the rows [C, 2s, ...] of all ranks: those that all rows of `rank` attend to, and those that its late rows do.

    The former are the early chunks of the ranks before it, the latter all rows of the ranks after it. Their order does not
    matter, for none of them is masked.
    """
    return x[:rank, : x.shape[1] // 2], x[rank + 1 :]
