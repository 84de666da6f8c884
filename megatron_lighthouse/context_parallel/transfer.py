"""Transfer: rows that lie on some ranks, moved to where they are wanted; all that pass between two ranks in one message.

Both ends list what travels in one order: by the rank at the other end, then by a key that both ends know.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_lighthouse.context_parallel.exchange import Exchange


@dataclass(frozen=True, eq=False)
class End:
    """One rank's end of a transfer."""

    rows: Tensor
    """[n] int64: the numbers of its rows that travel, in the order in which they do."""
    counts: tuple[int, ...]
    """Of these, to or from each rank."""
    length: int
    """Rows that there are on this end; those that do not travel are zero where they arrive."""
    copy: Tensor | None = None
    """[n] int64, where rows travel to several places: which of its copies each is."""
    copies: int = 1

    @cached_property
    def slots(self) -> Tensor:
        """[copies, length] int64: where among what travels each copy of each row is; n where it does not."""
        travels = len(self.rows)
        slots = self.rows.new_full((self.copies * self.length,), travels)
        place = self.rows if self.copy is None else self.copy * self.length + self.rows
        return slots.scatter_(0, place, torch.arange(travels, device=slots.device)).view(self.copies, -1)


@dataclass(frozen=True, eq=False)
class Queue:
    """What travels by one end, before the host knows how much that is."""

    order: Tensor
    """[m] int64: what travels, in order, then what does not."""
    counts: Tensor
    """[C] int64: to or from each rank."""

    @staticmethod
    def of(partner: Tensor, key: Tensor, span: int, size: int) -> Queue:
        """Of things that travel to or from rank `partner` of `size`, or not at all where that is `size`; keys below `span`."""
        together = (partner.long() * span + key).flatten()
        ordered, order = together.sort()
        bounds = torch.searchsorted(ordered, torch.arange(size + 1, device=order.device) * span)
        return Queue(order, bounds.diff())

    def end(self, counts: list[int], number: Tensor, length: int, copy: Tensor | None = None, copies: int = 1) -> End:
        """The end, once the host has read the counts.

        Args:
            number: of the row of each thing; any shape, as `partner`.
            copy: which of its row's `copies` each is, likewise.
        """
        order = self.order[: sum(counts)]
        return End(number.flatten()[order], tuple(counts), length, None if copy is None else copy.flatten()[order], copies)


@dataclass(frozen=True, eq=False)
class Transfer:
    """Rows [here.length, ...] to rows [there.length, ...]. Only this end's rows may travel to several places."""

    exchange: Exchange
    purpose: str
    here: End
    there: End

    def __call__(self, x: Tensor) -> Tensor:
        """Differentiable: gradients come the other way, and those of a row's copies are added up in order."""
        moved: Tensor = _Transfer.apply(x, self)
        return moved


class _Transfer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        return _move(x, transfer, transfer.here, transfer.there)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _move(grad, ctx.transfer, ctx.transfer.there, ctx.transfer.here), None


def _move(x: Tensor, transfer: Transfer, source: End, target: End) -> Tensor:
    moved = transfer.exchange.all_to_all(x[source.rows], transfer.purpose, source.counts, target.counts)
    padded = torch.cat([moved, moved.new_zeros(1, *moved.shape[1:])])
    if target.copies == 1:
        return padded[target.slots[0]]
    total = torch.zeros((target.length, *x.shape[1:]), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for slots in target.slots:
        total += padded[slots]
    return total.to(x.dtype)
