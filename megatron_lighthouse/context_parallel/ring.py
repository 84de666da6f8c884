"""Ring: in hop i each rank attends to the far rows of the rank i places before it, while the next ones travel.

They come straight from the rank that holds them, and only the half that will be read: of a lower rank the early chunk. In
backward they come again, and their gradients go straight back to their rank, which sums them: no partial sum is rounded on its
way. A rank's own rows come first in forward, while the first others travel, and last in backward, where the first others set
out before the gradient of the near rows is known (`Passage.begin_backward_with`). What NCCL sends beside an attention kernel
that takes all SMs costs its own time; so where NCCL sends (see `copies`), the last gradients go while those of the near rows
are spread over the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_lighthouse.context_parallel.exchange import Exchange, Parcel
from megatron_lighthouse.context_parallel.parts import Block, Mask, Tensors, saved_in, sinks_gradient
from megatron_lighthouse.once import once_differentiable
from megatron_lighthouse.sequence.layout import Layout


@dataclass(frozen=True)
class Ring:
    """Attention over shards by ring: see `Scheme`."""

    block: Block
    exchange: Exchange

    def passage(self) -> Passage:
        """The handle of one call, for steps before and after it that work while rows travel."""
        return Passage(self.exchange)

    def __call__(self, near: Tensors, far: Tensors, sinks: Tensor | None = None, passage: Passage | None = None) -> Tensor:
        out: Tensor = _Ring.apply(self, passage or self.passage(), sinks, len(near), *near, *far)
        return out

    def mask(self, rank: int) -> Mask:
        """Of this rank's near rows and those far rows of `rank` that they see."""
        own, theirs = self.exchange.layout.chunks, Layout(self.exchange.size, rank).chunks
        if rank == self.exchange.rank:
            return Mask(own, own)
        return Mask(own, theirs[:1]) if rank < self.exchange.rank else Mask(own[1:], theirs)


class Passage:
    """What is under way for one call of a ring, before it begins and after it has ended.

    Who makes the far rows just before calls `set_out` as soon as they are there, and `come_home` for their gradients: they
    travel while the near rows are made, and the last gradients while those of the near rows are used.
    """

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.arriving: _Arriving | None = None
        self.returning: _Returning | None = None
        self.travels = False
        """Whether `come_home` will be called for the gradients."""
        self.begun: tuple[Tensors, _Arriving] | None = None
        """What forward saved, and the others' far rows, where backward has begun."""

    def set_out(self, far: Tensors) -> None:
        self.arriving, self.travels = _Arriving(far, self.exchange), True

    def come_home(self, grads: Tensors) -> Tensors:
        returning, self.returning = self.returning, None
        return grads if returning is None else returning.added_to(grads)

    def begin_backward_with(self, output: Tensor, attended: Tensor) -> None:
        """Let the far rows set out again as soon as the gradient of `output` is there; `attended` is what the ring gave."""
        node: Any = attended.grad_fn  # the ring's ctx, which must not be kept here: it holds this
        if output.grad_fn is None or node is None:
            return

        def begin(_: Any) -> None:
            self.begun = self.begun or self.read(node)

        # not the tensor's hook: that also runs where its gradient alone is asked for, and then nothing receives what set out
        output.grad_fn.register_prehook(begin)

    def read(self, ctx: Any) -> tuple[Tensors, _Arriving]:
        """What forward saved, read once as checkpoints demand, and the others' far rows on their way."""
        saved = ctx.saved_tensors
        return saved, _Arriving(saved[ctx.near : ctx.near + ctx.far], self.exchange)


class _Ring(torch.autograd.Function):
    """(ring, passage, sinks or None, number of near tensors, *near, *far) -> output."""

    @staticmethod
    def forward(ctx: Any, ring: Ring, passage: Passage, sinks: Tensor | None, count: int, *rows: Tensor) -> Tensor:
        near, far = rows[:count], rows[count:]
        ctx.ring, ctx.passage, ctx.near, ctx.far = ring, passage, len(near), len(far)
        block, exchange = ring.block, ring.exchange
        arriving, passage.arriving = passage.arriving or _Arriving(far, exchange), None
        part = block.forward(near, far, ring.mask(exchange.rank))
        dtypes, several = part.dtypes, exchange.size > 2 or sinks is not None
        part = part.to(*[part.lse.dtype] * len(dtypes)) if several else part  # what is merged once is rounded once
        for rank, parcel in arriving:
            seeing = _rows(rank, exchange.rank, near[0])
            part[seeing].merge(block.forward(tuple(x[seeing] for x in near), parcel, ring.mask(rank)))
        part = part.with_sinks(sinks).to(*dtypes)
        ctx.save_for_backward(*near, *far, *part.averages, part.lse, sinks)
        return block.output(part)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ring: Ring = ctx.ring
        passage: Passage = ctx.passage
        (saved, arriving), passage.begun = passage.begun or passage.read(ctx), None
        near, far, part = saved_in(saved[:-1], ctx.near, ctx.far)
        block, exchange, wide = ring.block, ring.exchange, part.lse.dtype
        sums, returning = [_Sum(x, wide, exchange.size > 2) for x in near], _Returning(far, wide, exchange)
        for hop, (rank, parcel) in enumerate(arriving, 1):
            rows = _rows(rank, exchange.rank, grad)
            given = grad[rows], tuple(x[rows] for x in near), parcel, part[rows]
            d_near, d_far = block.backward(*given, ring.mask(rank))
            for total, x in zip(sums, d_near, strict=True):
                total.add(rows, x)
            returning.pack(rank, d_far)
            if hop < exchange.size - 1:
                returning.send()
        needed = ctx.needs_input_grad[4 + ctx.near :]
        late = passage.travels and all(needed) and not exchange.copies(grad.device)
        if not late:
            returning.send()
        own_near, own_far = block.backward(grad, near, far, part, ring.mask(exchange.rank))
        if late:
            returning.send()
            passage.returning = returning
        else:
            own_far = returning.added_to(own_far)
        d_sinks = sinks_gradient(saved[-1], grad, block.output(part), part.lse)
        return None, None, d_sinks, None, *(s.with_own(x) for s, x in zip(sums, own_near, strict=True)), *own_far


def _rows(rank: int, own: int, x: Tensor) -> slice:
    """The rows of rank `own` that attend to keys of `rank`: all to its early chunk if it is lower, else the late chunk."""
    return slice(None) if rank < own else slice(x.shape[0] // 2, None)


def _seen(rank: int, by: int, x: Tensor) -> slice:
    """The rows of `rank` that rank `by` attends to: the early chunk if it is lower, else all."""
    return slice(None, x.shape[0] // 2) if rank < by else slice(None)


class _Arriving:
    """The other ranks' far rows, in ring order; each is under way while the one before it is used.

    The first set out when this is made. Yields the rank and its rows.
    """

    def __init__(self, far: Tensors, exchange: Exchange) -> None:
        self.far, self.exchange = tuple(x.contiguous() for x in far), exchange
        self.following = self._begin(1)

    def __iter__(self) -> Iterator[tuple[int, Tensors]]:
        for hop in range(2, self.exchange.size + 1):
            rank, parcel = self.following
            rows = tuple(parcel.open())
            if hop < self.exchange.size:
                self.following = self._begin(hop)
            yield rank, rows
            parcel.close()

    def _begin(self, hop: int) -> tuple[int, Parcel]:
        size, rank = self.exchange.size, self.exchange.rank
        to, by = (rank + hop) % size, (rank - hop) % size
        parts = [x[_seen(rank, to, x)] for x in self.far]
        shapes = [x[_seen(by, rank, x)].shape for x in self.far]
        return by, self.exchange.swap(parts, hop, shapes, "attend", "keys", sum(x.nbytes for x in self.far))


class _Sum:
    """The gradient of a rank's rows: one part is added to its own as it is, several in the dtype of sums."""

    def __init__(self, like: Tensor, dtype: torch.dtype, several: bool) -> None:
        self.like = like
        self.total = torch.zeros_like(like, dtype=dtype, memory_format=torch.contiguous_format) if several else None
        self.part: tuple[slice, Tensor] | None = None

    def add(self, rows: slice, part: Tensor) -> None:
        if self.total is None:
            self.part = rows, part
        else:
            self.total[rows].add_(part)

    def with_own(self, own: Tensor) -> Tensor:
        if self.total is not None:
            return (self.total + own).to(self.like.dtype)
        if self.part is not None:
            rows, part = self.part
            own[rows].add_(part)
        return own


class _Returning:
    """Gradients of far rows on their way back to the ranks that hold these."""

    def __init__(self, far: Tensors, dtype: torch.dtype, exchange: Exchange) -> None:
        self.sums = [_Sum(x, dtype, exchange.size > 2) for x in far]
        self.exchange, self.hop = exchange, 0
        self.packed: tuple[int, Tensors] | None = None
        self.under_way: tuple[slice, Parcel] | None = None

    def pack(self, rank: int, parts: Tensors) -> None:
        """Have this hop's gradients of the far rows of `rank` ready."""
        self.packed = rank, tuple(x.contiguous() for x in parts)

    def send(self) -> None:
        """Send what is packed, and add what the hop before brought."""
        assert self.packed is not None
        if parcel := self._arrive():
            parcel.close()
        (_, parts), self.packed = self.packed, None
        self.hop += 1
        by = (self.exchange.rank + self.hop) % self.exchange.size
        rows = _seen(self.exchange.rank, by, self.sums[0].like)
        shapes = [x.like[rows].shape for x in self.sums]
        room = sum(x.like.nbytes for x in self.sums)
        self.under_way = rows, self.exchange.swap(parts, -self.hop, shapes, "attend", "gradients", room)

    def added_to(self, own: Tensors) -> Tensors:
        """This rank's gradients and all that came."""
        parcel = self._arrive()
        whole = tuple(total.with_own(x) for total, x in zip(self.sums, own, strict=True))
        if parcel is not None:
            parcel.close()
        return whole

    def _arrive(self) -> Parcel | None:
        """Add what is under way; the parcel, to be closed when the sums have been made."""
        if self.under_way is None:
            return None
        (rows, parcel), self.under_way = self.under_way, None
        for total, part in zip(self.sums, parcel.open(), strict=True):
            total.add(rows, part)
        return parcel
