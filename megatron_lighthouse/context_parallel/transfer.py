"""Transfer: rows that lie on some ranks, moved to where they are wanted; all that pass between two ranks in one message.

Both ends list what travels in one order: by the rank at the other end, then by a key that both ends know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.gpu import triton_takes
from megatron_lighthouse.once import once_differentiable
from megatron_lighthouse.sums import accumulation_dtype


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

    def kept(self, rank: int) -> slice:
        """Which of `rows` pass between `rank` and itself."""
        begin = sum(self.counts[:rank])
        return slice(begin, begin + self.counts[rank])


class Way(Protocol):
    """From the rows of this rank at one end, here, to those at the other, there. What stays on a rank is in no message."""

    @property
    def leaving(self) -> Tensor:
        """[·] integers: the rows that go to other ranks, in order."""

    @property
    def slots(self) -> Tensor:
        """[copies, rows there] integers: where each copy of each row comes from. A row here has its number, row i of what other
        ranks send is -2 - i; -1 where none comes."""

    @property
    def counts(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Rows to every other rank, and from it."""

    @property
    def back(self) -> Way:
        """From there to here."""


@dataclass(frozen=True, eq=False)
class Between:
    """A way as its ends list it. Only the rows of one of both may travel to several places."""

    here: End
    there: End
    rank: int

    @cached_property
    def back(self) -> Between:
        return Between(self.there, self.here, self.rank)

    @cached_property
    def leaving(self) -> Tensor:
        kept = self.here.kept(self.rank)
        return torch.cat([self.here.rows[: kept.start], self.here.rows[kept.stop :]])

    @cached_property
    def counts(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        to, by = ([n * (rank != self.rank) for rank, n in enumerate(end.counts)] for end in (self.here, self.there))
        return tuple(to), tuple(by)

    @cached_property
    def slots(self) -> Tensor:
        here, there, kept = self.here, self.there, self.there.kept(self.rank)
        others = -2 - torch.arange(len(there.rows) - there.counts[self.rank], device=there.rows.device)
        come = torch.cat([others[: kept.start], here.rows[here.kept(self.rank)], others[kept.start :]])
        place = there.rows if there.copy is None else there.copy * there.length + there.rows
        slots = come.new_full((there.copies * there.length,), -1)
        return slots.scatter_(0, place, come).view(there.copies, -1)


@dataclass(frozen=True, eq=False)
class Found:
    """A way whose tables are there."""

    leaving: Tensor
    slots: Tensor
    counts: tuple[tuple[int, ...], tuple[int, ...]]
    returning: Tensor
    """`leaving` of the way back."""
    back_slots: Tensor
    """`slots` of the way back."""

    @property
    def back(self) -> Found:
        return Found(self.returning, self.back_slots, (self.counts[1], self.counts[0]), self.leaving, self.slots)


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
        if span * (size + 1) < 2**31:
            together = together.int()  # which takes half as long to sort
        ordered, order = together.sort()
        begins = torch.arange(0, (size + 1) * span, span, dtype=together.dtype, device=order.device)
        bounds = torch.searchsorted(ordered, begins)
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
    """Rows of several tensors, moved along a way; those of one dtype that pass between two ranks go in one message."""

    exchange: Exchange
    purpose: str
    way: Way

    def __call__(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """[rows here, ...] each to [rows there, ...]. Differentiable: gradients come the other way, and those of a
        row's copies are added up in order."""
        moved: tuple[Tensor, ...] = _Transfer.apply(self, 1, *rows)
        return moved

    def of_groups(self, groups: int, *rows: Tensor) -> tuple[Tensor, ...]:
        """[n, B, ·, ·] each to [m, B, ·, ·], where the heads of each of G groups travel apart: as rows (n * B + b) * G + g."""
        moved: tuple[Tensor, ...] = _Transfer.apply(self, rows[0].shape[1] * groups, *rows)
        return moved


class _Transfer(torch.autograd.Function):
    """(transfer, rows that travel apart of each row given, *rows) -> rows."""

    @staticmethod
    def forward(ctx: Any, transfer: Transfer, each: int, *rows: Tensor) -> tuple[Tensor, ...]:
        ctx.transfer, ctx.each = transfer, each
        return _move(rows, each, transfer, transfer.way)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *_move(grads, ctx.each, ctx.transfer, ctx.transfer.way.back)


def _move(rows: Sequence[Tensor], each: int, transfer: Transfer, way: Way) -> tuple[Tensor, ...]:
    moved: list[Tensor] = [*rows]
    for dtype in {x.dtype: None for x in rows}:
        alike = [i for i, x in enumerate(rows) if x.dtype == dtype]
        flat = [x.reshape(x.shape[0] * each, prod(x.shape[1:]) // each) for x in (rows[i] for i in alike)]
        message = transfer.exchange.all_to_all(taken(flat, way.leaving), transfer.purpose, *way.counts)
        for i, x in zip(alike, placed(flat, message, way.slots), strict=True):
            moved[i] = x.view(x.shape[0] // each, *rows[i].shape[1:])
    return tuple(moved)


def taken(rows: Sequence[Tensor], leaving: Tensor) -> Tensor:
    """[n, W]: the rows [n] `leaving` of tensors [·, W_i] of one dtype, side by side."""
    if _by_triton(rows[0]):
        from megatron_lighthouse.kernels.placed import taken as kernel

        return kernel(rows, leaving)
    return torch.cat([x.index_select(0, leaving) for x in rows], 1)


def placed(rows: Sequence[Tensor], message: Tensor, slots: Tensor) -> list[Tensor]:
    """[n, W_i] of each tensor, of [copies, n] slots (see `Way.slots`) among its `rows` [·, W_i] and its part of those of a
    `message` as `taken` makes it; the sum of a row's copies, in order.

    Sums of several are in fp32, or as rows are where these are wider.
    """
    if _by_triton(message):
        from megatron_lighthouse.kernels.placed import placed as kernel

        return kernel(rows, message, slots)
    made = []
    for own, others in zip(rows, message.split([x.shape[1] for x in rows], 1), strict=True):
        among = torch.cat([own, others, own.new_zeros(1, own.shape[1])])
        index = torch.where(slots < -1, len(own) - 2 - slots, slots)
        if len(slots) == 1:
            made.append(among[index[0]])
            continue
        total = torch.zeros_like(among[index[0]], dtype=accumulation_dtype(own))
        for copy in index:
            total += among[copy]
        made.append(total.to(own.dtype))
    return made


def _by_triton(x: Tensor) -> bool:
    return triton_takes(x) and x.is_floating_point()
