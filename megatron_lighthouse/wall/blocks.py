"""Wall over parts: see `Block`. Near are query, key, value, gate and more; far are decayed keys, values and scalar gates.

Rows of one piece see each other along the diagonal, and what lies before their piece by way of the anchor at its start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_lighthouse.context_parallel.parts import Mask, Part, Tensors
from megatron_lighthouse.wall.cut import Cut, Piece
from megatron_lighthouse.wall.decay import Decays, joined, prefix, prefix_backward, spread, summed, sums
from megatron_lighthouse.wall.diagonal import Diagonal
from megatron_lighthouse.wall.earlier import Earlier, Rows
from megatron_lighthouse.wall.pieces import Run, Sight, runs
from megatron_lighthouse.wall.travel import Call, by_runs


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
    runs: list[Run]
    """The far rows, of a tensor."""
    rows: Rows
    factors: list[Tensor]
    """Of each run [pieces, B, heads, K], by which its keys were multiplied."""


@dataclass(frozen=True)
class Attention:
    """Of one call."""

    diagonal: Diagonal
    decays: Decays
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
        for meeting in self._meetings(given, self._decayed(given, far, mask), far, mask):
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
        grads = self._own_backward(grad, given, part) if mask.causal else given.each(_zeros)
        wide = part.lse.dtype
        grads = grads._replace(query=grads.query.to(wide))
        d_far = tuple(_zeros(x, wide) for x in far)
        decayed, of_decayed = self._decayed(given, far, mask), torch.zeros_like(given.query)
        for meeting in self._meetings(given, decayed, far, mask):
            self._seen_backward(grad, part, meeting, of_decayed, grads, d_far)
        if far:
            self._decayed_backward(given, decayed, of_decayed, grads, mask)
        d_near = grads._replace(query=grads.query.to(grad.dtype)).tensors
        return d_near, tuple(x.to(like.dtype) for x, like in zip(d_far, far, strict=True))

    def _groups(self, mask: Mask) -> list[Piece]:
        """Near rows with an anchor before each."""
        return self.cut.pieces(mask.near) if mask.causal else self.cut.whole(mask.near)

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
        d_gate, dv = summed(d_gate, given.gate.shape[2]), summed(dv, given.value.shape[2])
        d_sink = None
        if given.sink is not None:
            delta = (grad.to(d_gate.dtype) * out).sum(-1, keepdim=True)
            d_sink = -(_of_rows(given.sink) - part.lse).exp().permute(2, 0, 1).unsqueeze(-1) * delta
        return Near(dq, dk, dv, d_gate, None if d_scalar is None else d_scalar.unsqueeze(-1), d_sink)

    def _decayed(self, given: Near, far: Tensors, mask: Mask) -> Tensor:
        """Queries from the anchor before them; as they are where they meet nobody there."""
        decay = partial(self.decays.decay, after=False)
        return by_runs(self._groups(mask), decay, given.query, given.gate) if far else given.query

    def _meetings(self, given: Near, query: Tensor, far: Tensors, mask: Mask) -> Iterator[Meeting]:
        """One for each run of near rows that has an anchor of its own, and sees far rows before it.

        Args:
            query: what `_decayed` gives.
        """
        theirs = self.cut.pieces(mask.far) if far else []
        for group in self._groups(mask):
            first, end = self.sight.before(group)
            seen = [piece for piece in theirs if piece.number < group.number and piece.end > first]
            if not seen or end <= group.begin:
                continue
            near = slice(group.rows.start, group.rows.start + end - group.begin)
            hidden = self._hidden(group, end, first, seen, given)
            yield self._meeting(group, near, runs([piece.since(first) for piece in seen]), given, query[near], far, hidden)

    def _hidden(self, group: Piece, end: int, first: int, seen: list[Piece], given: Near) -> Tensor | None:
        if self.sight.window is None:
            return None
        device = given.query.device
        tokens = [torch.arange(max(piece.begin, first), piece.end, device=device) for piece in seen]
        visible = self.sight.first(torch.arange(group.begin, end, device=device))
        return torch.cat(tokens) < visible.unsqueeze(1)

    def _meeting(
        self, group: Piece, near: slice, seen: list[Run], given: Near, query: Tensor, far: Tensors, hidden: Tensor | None
    ) -> Meeting:
        assert self.call is not None
        between, *scalars = self.call.between(group.number)
        key, value, *of_scalar = far
        factors = [between[run.number : run.number + run.pieces].exp().to(given.gate.dtype) for run in seen]
        keys = key.new_empty(seen[-1].taken.stop, *key.shape[1:])
        for run, factor in zip(seen, factors, strict=True):
            self.decays.cross(keys[run.taken], key[run.rows], factor, run.step)
        made = Rows(query, keys, joined([value[run.rows] for run in seen]), hidden=hidden)
        if given.scalar is not None:
            totals = scalars[0].to(given.gate.dtype)
            to_anchor = [
                part + totals[run.number + i] for run in seen for i, part in enumerate(of_scalar[0][run.rows].split(run.step))
            ]
            made = replace(made, bias=(prefix(given.scalar[near]), torch.cat(to_anchor)))
        return Meeting(group.number, near, seen, made, factors)

    def _seen_backward(
        self, grad: Tensor, part: Part, meeting: Meeting, of_decayed: Tensor, grads: Near, d_far: Tensors
    ) -> None:
        """Add to the gradients of near and far rows, and note those of what lies between."""
        assert self.call is not None
        near, rows = meeting.near, meeting.rows
        dq, dk, dv, of_bias = self.earlier.backward(grad[near], rows, part[near])
        of_decayed[near] = dq
        of_far = [dv] if of_bias is None else [dv, of_bias[1]]
        if grads.scalar is not None and of_bias is not None:
            grads.scalar[near] += prefix_backward(of_bias[0])
        for run, factor in zip(meeting.runs, meeting.factors, strict=True):
            given = d_far[0][run.rows], rows.key[run.taken], dk[run.taken], factor
            crossed = [self.decays.cross_backward(*given, run.step)]
            for total, x in zip(d_far[1:], of_far, strict=True):
                total[run.rows] += x[run.taken]
            crossed += [sums(x[run.taken], run.step) for x in of_far[1:]]
            self.call.crossed.append((meeting.anchor, run.number, crossed))

    def _decayed_backward(self, given: Near, decayed: Tensor, of_decayed: Tensor, grads: Near, mask: Mask) -> None:
        """Add to the gradients of queries and gates, by way of the decayed queries."""
        for run in runs(self._groups(mask)):
            query, gate, grad = (x[run.rows] for x in (decayed, given.gate, of_decayed))
            self.decays.add_decayed(grads.query[run.rows], grad, gate, after=False, step=run.step)
            grads.gate[run.rows] += self.decays.decay_backward(query, grad, gate.shape[2], after=False, step=run.step)


def _zeros(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Contiguous, as what the kernels add to must be."""
    return torch.zeros(x.shape, dtype=dtype or x.dtype, device=x.device)


def _nothing(given: Near) -> Part:
    """Of rows that see nothing yet."""
    rows, batch, heads, _ = given.query.shape
    out = given.query.new_zeros(rows, batch, heads, given.value.shape[-1])
    return Part((out,), given.gate.new_full((batch, heads, rows), -torch.inf))


def _of_rows(x: Tensor) -> Tensor:
    """[n, B, H, 1] -> [B, H, n], as a log-sum-exp."""
    return x.squeeze(-1).permute(1, 2, 0)
