"""Ring: in step i each rank attends to the keys and values of the rank i places before it, while the next ones travel.

They come straight from the rank that holds them, and only the half that will be read: of a lower rank the early chunk. In
backward they come again, and the gradients of keys and values go straight back to their rank, which sums them: no partial sum
is rounded on its way. A rank's own keys come first in forward, while the first others travel, and last in backward, where the
first others set out before the gradient of the rows is known (`begin_backward_with`). What NCCL sends beside an attention
kernel that takes all SMs costs its own time; so where NCCL sends (see `copies`), the last gradients go while those of the
queries are spread over the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_lighthouse.context_parallel.exchange import Exchange, Parcel
from megatron_lighthouse.softmax.blocks import Block
from megatron_lighthouse.softmax.merge import merge


@dataclass
class RingAttention:
    """Attention over shards by ring, as `sharded_attention` gives it.

    Where the rows are gathered just before, the gather calls `set_out` and `come_home` (see `steps.KeyTravel`): keys travel
    while queries are gathered, and the last gradients while those of the queries are spread.
    """

    block: Block
    exchange: Exchange
    scale: float
    arriving: _Arriving | None = None
    returning: _Returning | None = None
    travels: bool = False
    """Whether `come_home` will be called for the gradients of the next call."""

    def set_out(self, key: Tensor, value: Tensor) -> None:
        self.arriving, self.travels = _Arriving(key, value, self.exchange), True

    def come_home(self, grad_key: Tensor, grad_value: Tensor) -> tuple[Tensor, Tensor]:
        returning, self.returning = self.returning, None
        return (grad_key, grad_value) if returning is None else returning.added_to(grad_key, grad_value)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return Ring.apply(query, key, value, self)


class Ring(torch.autograd.Function):
    """(query, key, value, attention) -> output."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, attention: RingAttention) -> Tensor:
        ctx.attention, ctx.begun = attention, None
        ctx.travels, attention.travels = attention.travels, False
        block, exchange, scale = attention.block, attention.exchange, attention.scale
        arriving, attention.arriving = attention.arriving or _Arriving(key, value, exchange), None
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
        begun, ctx.begun = ctx.begun or _begin_backward(ctx), None
        (query, key, value, out, lse), arriving = begun
        attention: RingAttention = ctx.attention
        block, exchange, scale = attention.block, attention.exchange, attention.scale
        dq, returning = _Sum(query, lse.dtype, exchange.size > 2), _Returning(key, value, lse.dtype, exchange)
        for step, (rank, k, v) in enumerate(arriving, 1):
            rows = _rows(rank, exchange.rank, query)
            part_q, *parts = block.backward(grad[rows], query[rows], k, v, out[rows], lse[..., rows], False, scale)
            dq.add(rows, part_q)
            returning.pack(rank, *parts)
            if step < exchange.size - 1:
                returning.send()
        late = ctx.travels and all(ctx.needs_input_grad[1:3]) and not exchange.copies(query.device)
        if not late:
            returning.send()
        own_q, own_k, own_v = block.backward(grad, query, key, value, out, lse, True, scale)
        if late:
            returning.send()
            attention.returning = returning
        else:
            own_k, own_v = returning.added_to(own_k, own_v)
        return dq.with_own(own_q), own_k, own_v, None


def begin_backward_with(output: Tensor, rows: Tensor) -> None:
    """Let the keys and values of `rows`, if `Ring` made them, set out as soon as the gradient of `output` is there."""
    node: Any = rows.grad_fn  # of `Ring` this is its ctx
    if output.grad_fn is None or not hasattr(node, "begun"):
        return

    def begin(_: Any) -> None:
        if node.begun is None:
            node.begun = _begin_backward(node)

    # not the tensor's hook: that also runs where its gradient alone is asked for, and nothing then receives what has set out
    output.grad_fn.register_prehook(begin)


def _begin_backward(ctx: Any) -> tuple[tuple[Tensor, ...], _Arriving]:
    """What forward saved, read once as checkpoints demand, and the others' keys and values on their way."""
    saved = ctx.saved_tensors
    return saved, _Arriving(saved[1], saved[2], ctx.attention.exchange)


def _rows(rank: int, own: int, x: Tensor) -> slice:
    """The rows of rank `own` that attend to keys of `rank`: all to its early chunk if it is lower, else the late chunk."""
    return slice(None) if rank < own else slice(x.shape[0] // 2, None)


def _seen(rank: int, by: int, x: Tensor) -> slice:
    """The rows of `rank` that rank `by` attends to: the early chunk if it is lower, else all."""
    return slice(None, x.shape[0] // 2) if rank < by else slice(None)


class _Arriving:
    """The other ranks' keys and values, in ring order; each is under way while the one before it is used.

    The first set out when this is made. Yields the rank, its keys and its values.
    """

    def __init__(self, key: Tensor, value: Tensor, exchange: Exchange) -> None:
        self.key, self.value, self.exchange = key.contiguous(), value.contiguous(), exchange
        self.following = self._begin(1)

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        for step in range(2, self.exchange.size + 1):
            rank, parcel = self.following
            k, v = parcel.open()
            if step < self.exchange.size:
                self.following = self._begin(step)
            yield rank, k, v
            parcel.close()

    def _begin(self, step: int) -> tuple[int, Parcel]:
        size, rank, whole = self.exchange.size, self.exchange.rank, (self.key, self.value)
        to, by = (rank + step) % size, (rank - step) % size
        parts = [x[_seen(rank, to, x)] for x in whole]
        shapes = [x[_seen(by, rank, x)].shape for x in whole]
        return by, self.exchange.swap(parts, to, by, shapes, "attend", "keys", sum(x.nbytes for x in whole))


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
            self.total[rows] += part

    def with_own(self, own: Tensor) -> Tensor:
        if self.total is not None:
            return (self.total + own).to(self.like.dtype)
        if self.part is not None:
            rows, part = self.part
            own[rows] += part
        return own


class _Returning:
    """Gradients of keys and values on their way back to the ranks that hold these."""

    def __init__(self, key: Tensor, value: Tensor, dtype: torch.dtype, exchange: Exchange) -> None:
        self.sums = tuple(_Sum(x, dtype, exchange.size > 2) for x in (key, value))
        self.exchange, self.step = exchange, 0
        self.packed: tuple[int, tuple[Tensor, ...]] | None = None
        self.under_way: tuple[slice, Parcel] | None = None

    def pack(self, rank: int, *parts: Tensor) -> None:
        """Have this step's gradients of the keys and values of `rank` ready."""
        self.packed = rank, tuple(x.contiguous() for x in parts)

    def send(self) -> None:
        """Send what is packed, and add what the step before brought."""
        assert self.packed is not None
        if parcel := self._arrive():
            parcel.close()
        (rank, parts), self.packed = self.packed, None
        self.step += 1
        by = (self.exchange.rank + self.step) % self.exchange.size
        rows = _seen(self.exchange.rank, by, self.sums[0].like)
        shapes = [x.like[rows].shape for x in self.sums]
        room = sum(x.like.nbytes for x in self.sums)
        self.under_way = rows, self.exchange.swap(parts, rank, by, shapes, "attend", "gradients", room)

    def added_to(self, own_key: Tensor, own_value: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's gradients and all that came."""
        parcel = self._arrive()
        dk, dv = self.sums
        whole = dk.with_own(own_key), dv.with_own(own_value)
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
