"""Deal: the gathered rows of ranks that hold different numbers of them, dealt evenly before attention and back after.

Row x of the S rows of a batch element and selection (a key/value head's, or that of several) lies on the rank that holds its
entry's chunk, and is attended to on the rank that holds chunk x // (S / 2C) of the rows. All rows that pass between two ranks
go in one message, of each dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.sequence.layout import Layout


@dataclass(frozen=True)
class Deal:
    """Who sends which rows to whom, for one selection."""

    exchange: Exchange
    held: int
    """Rows that this rank holds at most, over batch elements and key/value heads."""
    dealt: int
    """Rows that each rank attends to: S/C."""
    sends: Tensor
    """[rows] int64: this rank's rows, numbered (b * G + g) * held + row, in the order in which they are sent."""
    receives: Tensor
    """[rows] int64: where the rows that come belong, numbered (b * G + g) * dealt + row, in the order in which they come."""
    to: tuple[int, ...]
    """Rows for each rank."""
    by: tuple[int, ...]
    """Rows from each rank."""

    @staticmethod
    def of(starts: Tensor, gathered_length: int, exchange: Exchange) -> Deal:
        """The deal of `gathered_length` (S) rows, of which chunk c holds those from starts[..., c] to starts[..., c + 1].

        Args:
            starts: [B, G, 2C + 1] int64. Waits for the device once: how much is sent must be known to the host.
        """
        size, (early, late) = exchange.size, exchange.layout.chunks
        share = gathered_length // (2 * size)
        counts = starts.diff(dim=-1)
        own = counts[..., early] + counts[..., late]
        table = torch.cat([counts.flatten(), own.max().unsqueeze(0)]).tolist()
        held, device = table.pop(), starts.device
        row = torch.arange(held, device=device).expand(*starts.shape[:2], -1)
        in_early = row < counts[..., early, None]
        number = torch.where(in_early, row + starts[..., early, None], row - counts[..., early, None] + starts[..., late, None])
        target = number // share
        target = torch.minimum(target, 2 * size - 1 - target)
        target = target.where(row < own.unsqueeze(-1), size)  # behind the last rank: rows that are not there
        place = torch.arange(2 * share, device=device).expand(*starts.shape[:2], -1)
        number = torch.where(place < share, place + early * share, place - share + late * share)
        source = torch.searchsorted(starts[..., 1:].contiguous(), number.contiguous(), right=True)
        source = torch.minimum(source, 2 * size - 1 - source)
        to, by = _rows_between(table, size, share, exchange.rank)
        sends = target.flatten().argsort(stable=True)[: sum(to)]
        return Deal(exchange, held, 2 * share, sends, source.flatten().argsort(stable=True), to, by)

    def out(self, groups: int, *tensors: Tensor) -> list[Tensor]:
        """Rows as gathered, [held, B, ·, ·], to rows as attended to, [S/C, B, ·, ·]; differentiable.

        Args:
            groups: G, selections. Those of the heads of one travel together, and tensors of one dtype.
        """
        found: dict[int, Tensor] = {}
        for dtype in dict.fromkeys(x.dtype for x in tensors):
            some = {i: x for i, x in enumerate(tensors) if x.dtype == dtype}
            grouped = [x.unflatten(2, (groups, -1)).flatten(3) for x in some.values()]
            dealt = self._pass(torch.cat(grouped, 3), self.sends, self.to, self.receives, self.by, self.dealt)
            parts = dealt.split([x.shape[3] for x in grouped], 3)
            for (i, like), x in zip(some.items(), parts, strict=True):
                found[i] = x.unflatten(3, (-1, like.shape[3])).flatten(2, 3)
        return [found[i] for i in range(len(tensors))]

    def back(self, rows: Tensor, groups: int) -> Tensor:
        """Rows as attended to, [S/C, B, H, D], to rows as gathered, [held, B, H, D]; differentiable."""
        heads = rows.unflatten(2, (groups, -1))
        return self._pass(heads, self.receives, self.by, self.sends, self.to, self.held).flatten(2, 3)

    def _pass(self, x: Tensor, take: Tensor, to: tuple[int, ...], put: Tensor, by: tuple[int, ...], length: int) -> Tensor:
        """[·, B, G, ...] -> [length, B, G, ...]."""
        batch, groups = x.shape[1:3]
        flat = x.movedim(0, 2).flatten(0, 2)
        moved: Tensor = _Pass.apply(flat, take, to, put, by, batch * groups * length, self.exchange)
        return moved.unflatten(0, (batch, groups, length)).movedim(2, 0)


class _Pass(torch.autograd.Function):
    """The rows `take` of x, sent, and put where they belong. Each goes to one place, so backward is the same the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, take: Tensor, to: Any, put: Tensor, by: Any, length: int, exchange: Exchange) -> Tensor:
        ctx.save_for_backward(take, put)
        ctx.way = to, by, x.shape[0], exchange
        return _move(x, take, to, put, by, length, exchange)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (take, put), (to, by, length, exchange) = ctx.saved_tensors, ctx.way
        return _move(grad, put, by, take, to, length, exchange), *[None] * 6


def _move(x: Tensor, take: Tensor, to: Any, put: Tensor, by: Any, length: int, exchange: Exchange) -> Tensor:
    moved = exchange.all_to_all(x[take], "deal", to, by)
    out = moved.new_zeros(length, *moved.shape[1:])
    out[put] = moved
    return out


def _rows_between(counts: list[int], size: int, share: int, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Rows that `rank` sends to each rank, and receives from each, from the rows of each chunk (by batch element and head)."""
    to, by, holder = [0] * size, [0] * size, Layout(size, rank).owner
    for at in range(0, len(counts), 2 * size):
        start = 0
        for chunk, count in enumerate(counts[at : at + 2 * size]):
            for target in range(start // share, -(-(start + count) // share)):
                rows = min(start + count, (target + 1) * share) - max(start, target * share)
                if holder(chunk) == rank:
                    to[holder(target)] += rows
                if holder(target) == rank:
                    by[holder(chunk)] += rows
            start += count
    return tuple(to), tuple(by)
