"""Windowed: each row sees some rows before it alone, so that a rank fetches what comes before its two chunks, and attends.

What a window reaches past a chunk's beginning, its halo, comes straight from the ranks that hold it, and its gradients go
straight back. Windows longer than a chunk reach several chunks, as far as the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_lighthouse.context_parallel.alone import WHOLE
from megatron_lighthouse.context_parallel.exchange import Exchange, finish
from megatron_lighthouse.context_parallel.parts import Block, Tensors, saved_in, sinks_gradient
from megatron_lighthouse.once import once_differentiable
from megatron_lighthouse.sequence.layout import Layout
from megatron_lighthouse.sums import accumulation_dtype


@dataclass(frozen=True)
class Windowed:
    """Attention over shards of rows that see `before` rows before them: see `Scheme`."""

    block: Block
    """Over far rows that end with the near ones: its window, not the mask, hides what is too far back."""
    exchange: Exchange
    before: int

    def __call__(self, near: Tensors, far: Tensors, sinks: Tensor | None = None) -> Tensor:
        out: Tensor = _Windowed.apply(self, sinks, len(near), *near, *far)
        return out

    def pieces(self, length: int, of: int, by: int) -> Iterator[tuple[int, int, int]]:
        """(chunk, rows, chunk): the last rows of a chunk of rank `of` that a chunk of rank `by` sees, in one order for both.

        Args:
            length: rows of a chunk.
        """
        for chunk in Layout(self.exchange.size, of).chunks:
            for later in Layout(self.exchange.size, by).chunks:
                between = (later - chunk - 1) * length
                if later > chunk and between < self.before:
                    yield chunk, min(length, self.before - between), later

    def fetched(self, far: Tensors) -> list[Tensors]:
        """The far rows of each of this rank's chunks, and before them those of its halo."""
        own, length = self.exchange.layout.chunks, far[0].shape[0] // 2
        chunks = {chunk: tuple(x[i * length : (i + 1) * length] for x in far) for i, chunk in enumerate(own)}
        halos = self._passed(length, lambda chunk, rows, _: tuple(x[length - rows :] for x in chunks[chunk]), far, away=True)
        found = []
        for chunk in own:
            before = [halos[earlier, chunk] for earlier in range(chunk) if (earlier, chunk) in halos]
            found.append(tuple(torch.cat(x) for x in zip(*before, chunks[chunk], strict=True)))
        return found

    def returned(self, grads: list[Tensors], length: int) -> Tensors:
        """The gradients of this rank's far rows, from those of what it and others fetched; sums in the dtype of sums."""
        own, like = self.exchange.layout.chunks, grads[0]
        wide = accumulation_dtype(like[0])
        sums = tuple(torch.cat([x[-length:] for x in parts]).to(wide) for parts in zip(*grads, strict=True))

        def part(chunk: int, rows: int, later: int) -> Tensors:
            found = grads[own.index(later)]
            end = found[0].shape[0] - (later - chunk) * length
            return tuple(x[end - rows : end] for x in found)

        for (chunk, _), parts in self._passed(length, part, like, away=False).items():
            end = (own.index(chunk) + 1) * length
            for total, x in zip(sums, parts, strict=True):
                total[end - x.shape[0] : end] += x
        return tuple(x.to(given.dtype) for x, given in zip(sums, like, strict=True))

    def _passed(self, length: int, part: Any, like: Tensors, away: bool) -> dict[tuple[int, int], Tensors]:
        """What `part` gives of each piece, at the rank that wants it: `away` from the rank that holds the rows, or back."""
        rank, found = self.exchange.rank, {}
        sends: list[tuple[Tensor, int]] = []
        receives: list[tuple[Tensor, int]] = []
        for other in range(self.exchange.size):
            given, wanted = ((rank, other), (other, rank)) if away else ((other, rank), (rank, other))
            for chunk, rows, later in self.pieces(length, *given):
                tensors = part(chunk, rows, later)
                if other == rank:
                    found[chunk, later] = tensors
                else:
                    sends += [(x.contiguous(), other) for x in tensors]
            for chunk, rows, later in self.pieces(length, *wanted):
                if other != rank:
                    found[chunk, later] = tuple(x.new_empty(rows, *x.shape[1:]) for x in like)
                    receives += [(x, other) for x in found[chunk, later]]
        finish(self.exchange.start(sends, receives, "attend"))
        return found


class _Windowed(torch.autograd.Function):
    """(scheme, sinks or None, number of near tensors, *near, *far) -> output."""

    @staticmethod
    def forward(ctx: Any, scheme: Windowed, sinks: Tensor | None, count: int, *rows: Tensor) -> Tensor:
        near, far = rows[:count], rows[count:]
        fetched, outputs, saved = scheme.fetched(far), [], []
        for seeing, seen in zip(_chunks(near), fetched, strict=True):
            part = scheme.block.forward(seeing, seen, WHOLE).with_sinks(sinks)
            outputs.append(scheme.block.output(part))
            saved.append((*seeing, *seen, *part.averages, part.lse))
        ctx.scheme, ctx.near, ctx.far = scheme, len(near), len(far)
        ctx.save_for_backward(*(x for chunk in saved for x in chunk), sinks)
        return torch.cat(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *saved, sinks = ctx.saved_tensors
        scheme: Windowed = ctx.scheme
        d_near, d_fetched, d_sinks, each = [], [], [], len(saved) // 2
        for i, given in enumerate(grad.chunk(2)):
            near, far, part = saved_in(saved[i * each : (i + 1) * each], ctx.near, ctx.far)
            of_near, of_far = scheme.block.backward(given, near, far, part, WHOLE)
            d_near.append(of_near)
            d_fetched.append(of_far)
            d_sinks.append(sinks_gradient(sinks, given, scheme.block.output(part), part.lse))
        total = None if sinks is None else torch.stack([x for x in d_sinks if x is not None]).sum(0)
        return (
            None,
            total,
            None,
            *(torch.cat(x) for x in zip(*d_near, strict=True)),
            *scheme.returned(d_fetched, grad.shape[0] // 2),
        )


def _chunks(rows: Tensors) -> list[Tensors]:
    """Those of a rank's first chunk, and of its second."""
    return list(zip(*(x.chunk(2) for x in rows), strict=True))
