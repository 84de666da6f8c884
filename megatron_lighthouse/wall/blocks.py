"""Wall over parts: see `Block`. Near are query, key, value, gate and more; far are decayed keys, values and scalar gates.

Rows of one piece see each other along the diagonal, those of other pieces of their chunk as `within` says, and other chunks by
way of the anchor at the start of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_lighthouse.context_parallel.parts import Mask, Part, Tensors
from megatron_lighthouse.wall.cut import Cut
from megatron_lighthouse.wall.decay import (
    Decays,
    between_backward,
    joined,
    prefix,
    prefix_backward,
    suffix,
    summed,
    sums,
)
from megatron_lighthouse.wall.diagonal import Diagonal
from megatron_lighthouse.wall.earlier import Earlier, Rows
from megatron_lighthouse.wall.near import Near
from megatron_lighthouse.wall.pieces import Meeting, Sight, meetings, runs
from megatron_lighthouse.wall.travel import Call
from megatron_lighthouse.wall.within import Within


class Met(NamedTuple):
    """What of a meeting is made anew in each direction."""

    rows: Rows
    factors: list[Tensor]
    """Of each run of far rows, by which its keys were multiplied."""


@dataclass(frozen=True)
class Attention:
    """Of one call."""

    diagonal: Diagonal
    decays: Decays
    earlier: Earlier
    scale: float
    cut: Cut
    """Into the pieces that travel."""
    within: Within
    sight: Sight
    first: Tensor
    """[n] int32, of this rank's rows: see `first_rows`."""
    scalar: bool = False
    """Whether there are scalar gates; the last but sinks of the near rows."""
    sink: bool = False
    call: Call | None = None

    def forward(self, near: Tensors, far: Tensors, mask: Mask) -> Part:
        given = self._near(near)
        part = self.within.forward(given, self._own(given), mask.near, self._call) if mask.causal else _nothing(given)
        meetings = self._meetings(mask, far)
        query = self._decayed(given, meetings)
        for meeting in meetings:
            own, found = part[meeting.near.rows], self.earlier.forward(self._met(meeting, given, query, far).rows)
            if mask.causal:  # each row meets others once: it is rounded once, in its own dtype too
                own.merge(found)
            else:
                own.averages[0].copy_(found.averages[0])
                own.lse.copy_(found.lse)
        return part

    def output(self, part: Part) -> Tensor:
        return part.averages[0]

    def backward(self, grad: Tensor, near: Tensors, far: Tensors, part: Part, mask: Mask) -> tuple[Tensors, Tensors]:
        given = self._near(near)
        grads = self._own_backward(grad, given, part) if mask.causal else given.each(_zeros)
        if mask.causal:
            self.within.backward(grad, given, part, grads, mask.near, self._call)
        d_far = tuple(_zeros(x, part.lse.dtype) for x in far)
        meetings = self._meetings(mask, far)
        query = self._decayed(given, meetings)
        found = [self._met_backward(grad, given, query, far, part, meeting, grads, d_far) for meeting in meetings]
        if found:
            self._decayed_backward(given, meetings, query, joined(found), grads)
        return grads.tensors, tuple(x.to(like.dtype) for x, like in zip(d_far, far, strict=True))

    @property
    def _call(self) -> Call:
        assert self.call is not None
        return self.call

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
        return Near(dq, dk, dv, d_gate, None if d_scalar is None else d_scalar.unsqueeze(-1).contiguous(), d_sink)

    def _meetings(self, mask: Mask, far: Tensors) -> tuple[Meeting, ...]:
        return meetings(self.cut, self.sight, mask) if far else ()

    def _decayed(self, given: Near, meetings: Sequence[Meeting]) -> Tensor:
        """The queries that meet others, one after the other, from the anchor before them."""
        pieces = [meeting.near for meeting in meetings]
        return self._call.decayed(self.decays, pieces, given.query, given.gate, after=False, dtype=given.query.dtype)

    def _hidden(self, meeting: Meeting, device: torch.device) -> Tensor | None:
        if self.sight.window is None:
            return None
        near = meeting.near
        tokens = [torch.arange(piece.begin, piece.end, device=device) for piece in meeting.seen]
        visible = self.sight.first(torch.arange(near.begin, near.end, device=device))
        return torch.cat(tokens) < visible.unsqueeze(1)

    def _met(self, meeting: Meeting, given: Near, query: Tensor, far: Tensors) -> Met:
        """The rows that meet. `query`: what `_decayed` gives."""
        anchor, far_runs = meeting.near.number, meeting.far
        between, *of_scalar = (total[:anchor] for total in self._call.totals)
        key, value, *scalar = far
        keys = key.new_empty(far_runs[-1].taken.stop, *key.shape[1:])
        factors = [self.decays.cross(keys[run.taken], key[run.rows], between[run.number :], run.step) for run in far_runs]
        values, hidden = joined([value[run.rows] for run in far_runs]), self._hidden(meeting, key.device)
        made = Rows(query[meeting.taken], keys, values, hidden=hidden)
        if given.scalar is not None:
            totals = suffix(of_scalar[0]).to(given.gate.dtype)
            to_anchor = [
                part + totals[run.number + i] for run in far_runs for i, part in enumerate(scalar[0][run.rows].split(run.step))
            ]
            made = replace(made, bias=(prefix(given.scalar[meeting.near.rows]), torch.cat(to_anchor)))
        return Met(made, factors)

    def _met_backward(
        self,
        grad: Tensor,
        given: Near,
        query: Tensor,
        far: Tensors,
        part: Part,
        meeting: Meeting,
        grads: Near,
        d_far: Tensors,
    ) -> Tensor:
        """The gradient of the decayed queries; add those of scalar gates, of far rows, and of what lies between."""
        near, (rows, factors) = meeting.near.rows, self._met(meeting, given, query, far)
        dq, dk, dv, of_bias = self.earlier.backward(grad[near], rows, part[near])
        of_far = [dv] if of_bias is None else [dv, of_bias[1]]
        if grads.scalar is not None and of_bias is not None:
            grads.scalar[near].add_(prefix_backward(of_bias[0]))
        for run, factor in zip(meeting.far, factors, strict=True):
            of_between, *of_scalar = (x[run.number : meeting.near.number] for x in self._call.total_grads())
            given_keys = rows.key[run.taken], dk[run.taken], factor
            self.decays.cross_backward(d_far[0][run.rows], of_between, *given_keys, run.step)
            for total, x in zip(d_far[1:], of_far, strict=True):
                total[run.rows].add_(x[run.taken])
            for of_total, x in zip(of_scalar, of_far[1:], strict=True):
                between_backward(of_total, sums(x[run.taken], run.step))
        return dq

    def _decayed_backward(self, given: Near, meetings: Sequence[Meeting], query: Tensor, grad: Tensor, grads: Near) -> None:
        """Add to the gradients of queries and gates, by way of the decayed queries."""
        for run in runs([meeting.near for meeting in meetings]):
            dq, gate = grad[run.taken], given.gate[run.rows]
            tile_sums = self._call.tile_sums_of(self.decays, given.gate, run)
            self.decays.decay(grads.query[run.rows], dq, gate, tile_sums, after=False, step=run.step, add=True)
            self.decays.decay_backward(grads.gate[run.rows], query[run.taken], dq, after=False, step=run.step)


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
