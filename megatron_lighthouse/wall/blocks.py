"""Wall over parts: see `Block`. Near are query, key, value, gate and more; far are decayed keys, values and scalar gates.

Rows of one piece see each other along the diagonal, and what lies before their piece by way of the anchor at its start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_lighthouse.context_parallel.parts import Mask, Part, Tensors
from megatron_lighthouse.wall.decay import prefix, prefix_backward, spread
from megatron_lighthouse.wall.diagonal import Diagonal
from megatron_lighthouse.wall.earlier import Earlier, Rows
from megatron_lighthouse.wall.pieces import Cut, Piece, Sight
from megatron_lighthouse.wall.travel import Call


class Near(NamedTuple):
    """What stays, by rows, and its gradients."""

    query: Tensor
    """[n, B, H, K]."""
    key: Tensor
    value: Tensor
    gate: Tensor
    """[n, B, H or G, K], in the dtype of sums, as those below."""
    scalar: Tensor | None = None
    """[n, B, H, 1]."""
    sink: Tensor | None = None
    """[n, B, H, 1]: each row's own, so that its gradient is a row's."""

    @property
    def tensors(self) -> Tensors:
        return tuple(x for x in self if x is not None)

    def flat_scalar(self) -> Tensor | None:
        return None if self.scalar is None else self.scalar.squeeze(-1)

    def alike(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """For the diagonal: a gate for each query head, and as many values as keys, which in Lighthouse are as gates."""
        value, gate = spread(self.value, self.key.shape[2]), spread(self.gate, self.query.shape[2])
        return self.query, self.key, value, gate, self.flat_scalar()

    def each(self, change: Callable[[Tensor], Tensor]) -> Near:
        query, key, value, gate = (change(x) for x in self[:4])
        scalar, sink = (None if x is None else change(x) for x in self[4:])
        return Near(query, key, value, gate, scalar, sink)


class Meeting(NamedTuple):
    """Near rows that see far ones."""

    anchor: int
    """The piece that the near rows begin."""
    near: slice
    far: list[tuple[int, slice]]
    """The pieces that the far rows are of."""
    rows: Rows
    of_query: Tensor
    """[n, B, heads, K], what the queries were multiplied by."""
    of_key: list[Tensor]
    """[B, heads, K] of each piece, what its keys were."""


@dataclass(frozen=True)
class Attention:
    """Of one call."""

    diagonal: Diagonal
    earlier: Earlier
    scale: float
    cut: Cut
    sight: Sight
    first: Tensor
    """[n] int32, of this rank's rows: see `first_rows`."""
    scalar: bool = False
    """Whether there are scalar gates; the last but sinks of the near rows."""
    sink: bool = False
    call: Call | None = None

    def forward(self, near: Tensors, far: Tensors, mask: Mask) -> Part:
        given = self._near(near)
        part = self._own(given) if mask.causal else _nothing(given)
        dtypes = part.dtypes
        part = part.to(part.lse.dtype)
        for meeting in self._meetings(given, far, mask):
            own, found = part[meeting.near], self.earlier.forward(meeting.rows)
            if mask.causal:
                own.merge(found)
            else:  # each row meets others once
                own.averages[0].copy_(found.averages[0])
                own.lse.copy_(found.lse)
        return part.to(*dtypes)

    def output(self, part: Part) -> Tensor:
        return part.averages[0]

    def backward(self, grad: Tensor, near: Tensors, far: Tensors, part: Part, mask: Mask) -> tuple[Tensors, Tensors]:
        given = self._near(near)
        grads = self._own_backward(grad, given, part) if mask.causal else given.each(torch.zeros_like)
        wide = part.lse.dtype
        grads = grads._replace(query=grads.query.to(wide))
        d_far = tuple(torch.zeros_like(x, dtype=wide) for x in far)
        for meeting in self._meetings(given, far, mask):
            self._seen_backward(grad, part, meeting, grads, d_far)
        d_near = grads._replace(query=grads.query.to(grad.dtype)).tensors
        return d_near, tuple(x.to(like.dtype) for x, like in zip(d_far, far, strict=True))

    def _near(self, near: Tensors) -> Near:
        query, key, value, gate, *more = near
        return Near(query, key, value, gate, more[0] if self.scalar else None, more[-1] if self.sink else None)

    def _own(self, given: Near) -> Part:
        """The diagonal, and the sink as a key whose value is 0."""
        out, lse = self.diagonal.forward(*given.alike(), self.scale, self.first)
        if given.sink is None:
            return Part((out,), lse)
        total = torch.logaddexp(lse, _of_rows(given.sink))
        share = (lse - total).exp().permute(2, 0, 1).unsqueeze(-1)
        return Part(((out * share).to(out.dtype),), total)

    def _own_backward(self, grad: Tensor, given: Near, part: Part) -> Near:
        (out,) = part.averages
        found = self.diagonal.backward(grad, *given.alike(), out, part.lse, self.scale, self.first)
        dq, dk, dv, d_gate, d_scalar = found
        d_gate, dv = _summed(d_gate, given.gate.shape[2]), _summed(dv, given.value.shape[2])
        d_sink = None
        if given.sink is not None:
            delta = (grad.to(d_gate.dtype) * out).sum(-1, keepdim=True)
            d_sink = -(_of_rows(given.sink) - part.lse).exp().permute(2, 0, 1).unsqueeze(-1) * delta
        return Near(dq, dk, dv, d_gate, None if d_scalar is None else d_scalar.unsqueeze(-1), d_sink)

    def _meetings(self, given: Near, far: Tensors, mask: Mask) -> Iterator[Meeting]:
        """One for each run of near rows that has an anchor of its own, and sees far rows before it."""
        theirs = self.cut.pieces(mask.far) if far else []
        for group in self.cut.pieces(mask.near) if mask.causal else self.cut.whole(mask.near):
            first, end = self.sight.before(group)
            seen = [piece for piece in theirs if piece.number < group.number and piece.end > first]
            if not seen or end <= group.begin:
                continue
            near = slice(group.rows.start, group.rows.start + end - group.begin)
            rows = [(p.number, slice(p.rows.start + max(first - p.begin, 0), p.rows.stop)) for p in seen]
            hidden = self._hidden(group, end, first, seen, given)
            yield self._decayed(group, near, rows, given.each(itemgetter(near)), far, hidden)

    def _hidden(self, group: Piece, end: int, first: int, seen: list[Piece], given: Near) -> Tensor | None:
        if self.sight.window is None:
            return None
        device = given.query.device
        tokens = [torch.arange(max(piece.begin, first), piece.end, device=device) for piece in seen]
        visible = self.sight.first(torch.arange(group.begin, end, device=device))
        return torch.cat(tokens) < visible.unsqueeze(1)

    def _decayed(
        self, group: Piece, near: slice, seen: list[tuple[int, slice]], given: Near, far: Tensors, hidden: Tensor | None
    ) -> Meeting:
        assert self.call is not None
        between, *scalars = self.call.between(group.number)
        key, value, *of_scalar = far
        of_query, of_key = prefix(given.gate).exp(), [between[number].exp() for number, _ in seen]
        query = (given.query * spread(of_query, given.query.shape[2])).to(key.dtype)
        keys = torch.cat([(key[rows] * factor).to(key.dtype) for (_, rows), factor in zip(seen, of_key, strict=True)])
        made = Rows(query, keys, torch.cat([value[rows] for _, rows in seen]), hidden=hidden)
        if given.scalar is not None:
            to_anchor = torch.cat([of_scalar[0][rows] + scalars[0][number] for number, rows in seen])
            made = replace(made, bias=(prefix(given.scalar), to_anchor))
        return Meeting(group.number, near, seen, made, of_query, of_key)

    def _seen_backward(self, grad: Tensor, part: Part, meeting: Meeting, grads: Near, d_far: Tensors) -> None:
        """Add to the gradients of near and far rows, and note those of what lies between."""
        assert self.call is not None
        near, rows = meeting.near, meeting.rows
        dq, dk, dv, of_bias = self.earlier.backward(grad[near], rows, part[near])
        grads.query[near] += dq * spread(meeting.of_query, dq.shape[2])
        wide = part.lse.dtype
        grads.gate[near] += prefix_backward(_summed(rows.query.to(wide) * dq, grads.gate.shape[2]))
        of_gate, of_scalar = rows.key.to(wide) * dk, []
        if grads.scalar is not None and of_bias is not None:
            grads.scalar[near] += prefix_backward(of_bias[0])
            of_scalar.append(of_bias[1])
        lengths = [some.stop - some.start for _, some in meeting.far]
        split = (x.split(lengths) for x in (dk, dv, *of_scalar))
        for (_, some), factor, of_rows in zip(meeting.far, meeting.of_key, zip(*split, strict=True), strict=True):
            d_key, *others = of_rows
            d_far[0][some] += d_key * factor
            for total, x in zip(d_far[1:], others, strict=True):
                total[some] += x
        crossed = [torch.stack([x.sum(0, dtype=torch.float64) for x in y.split(lengths)]) for y in (of_gate, *of_scalar)]
        self.call.crossed[meeting.anchor, *(number for number, _ in meeting.far)] = crossed


def _nothing(given: Near) -> Part:
    """Of rows that see nothing yet."""
    rows, batch, heads, _ = given.query.shape
    out = given.query.new_zeros(rows, batch, heads, given.value.shape[-1])
    return Part((out,), given.gate.new_full((batch, heads, rows), -torch.inf))


def _of_rows(x: Tensor) -> Tensor:
    """[n, B, H, 1] -> [B, H, n], as a log-sum-exp."""
    return x.squeeze(-1).permute(1, 2, 0)


def _summed(x: Tensor, heads: int) -> Tensor:
    """Over the heads that share one of `heads`; summed in the dtype of sums."""
    if x.shape[2] == heads:
        return x
    return x.unflatten(2, (heads, -1)).sum(3, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)
