"""Rows of a chunk that lie in different pieces of it: plain softmax attention of decayed rows, half by half (`meets`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lighthouse.context_parallel.parts import Part
from megatron_lighthouse.wall.cut import Cut
from megatron_lighthouse.wall.decay import Decays, prefix, prefix_backward, suffix, suffix_backward
from megatron_lighthouse.wall.earlier import Earlier, Rows
from megatron_lighthouse.wall.meets import Meet, meets
from megatron_lighthouse.wall.near import Near
from megatron_lighthouse.wall.pieces import Run, Sight
from megatron_lighthouse.wall.travel import Call


@dataclass(frozen=True)
class Within:
    """Of chunks of so many rows."""

    decays: Decays
    earlier: Earlier
    chunk: int
    step: int
    """Rows of a piece."""
    sight: Sight

    def forward(self, given: Near, part: Part, chunks: Sequence[int], call: Call) -> Part:
        """The part of all rows of their chunk that rows see, from that of those of their piece."""
        (out,), lse = part.averages, part.lse
        part = Part((out.contiguous(),), lse.contiguous())  # what is merged is written in place
        for run, found in self._chunks(chunks):
            own, in_place = given.rows(run.rows), part[run.rows]
            tile_sums = call.tile_sums_of(self.decays, given.gate, run)
            near, far = self.decays.halves(own.query, own.key, own.gate, tile_sums, self.step)
            for meet in found:
                _of(meet, in_place).merge(self.earlier.forward(self._met(meet, own, near, far)))
        return part

    def backward(self, grad: Tensor, given: Near, part: Part, grads: Near, chunks: Sequence[int], call: Call) -> None:
        """Add the gradients by way of these."""
        for run, found in self._chunks(chunks):
            own, of_own, of_out, whole = given.rows(run.rows), grads.rows(run.rows), grad[run.rows], part[run.rows]
            tile_sums = call.tile_sums_of(self.decays, given.gate, run)
            near, far = self.decays.halves(own.query, own.key, own.gate, tile_sums, self.step)
            # what has met makes place for its gradients; there must be zeros for what is left out
            value, alike = own.value, self.sight == Sight()
            of_near, of_far = (near, far) if alike else (torch.zeros_like(near), torch.zeros_like(far))
            of_value = (value.new_empty if alike else value.new_zeros)(len(far), *value.shape[1:])
            for meet in found:
                met = self._met(meet, own, near, far)
                dq, dk, dv, of_bias = self.earlier.backward(meet.of_later(of_out), met, _of(meet, whole))
                for place, x in ((meet.of_near(of_near), dq), (meet.of_far(of_far), dk), (meet.of_far(of_value), dv)):
                    place.copy_(x)
                if of_own.scalar is not None and of_bias is not None:
                    meet.of_later(of_own.scalar).add_(prefix_backward(of_bias[0]))
                    meet.of_earlier(of_own.scalar).add_(suffix_backward(of_bias[1]))
            grads_of = of_near, of_far, of_value
            self.decays.halves_backward(of_own[:4], grads_of, own.query, own.key, own.gate, tile_sums, self.step)

    def _chunks(self, chunks: Sequence[int]) -> list[tuple[Run, tuple[Meet, ...]]]:
        """The pieces of each, and what meets among them; chunks in which nothing does are left out."""
        pieces, found = Cut(self.chunk, self.step).per_chunk, []
        for i, chunk in enumerate(chunks):
            rows = slice(i * self.chunk, (i + 1) * self.chunk)
            if each := meets(self.chunk, self.step, self.sight, chunk * self.chunk):
                found.append((Run(chunk * pieces, pieces, rows, rows, self.step), each))
        return found

    def _met(self, meet: Meet, own: Near, near: Tensor, far: Tensor) -> Rows:
        bias = None
        if own.scalar is not None:
            bias = prefix(meet.of_later(own.scalar)), suffix(meet.of_earlier(own.scalar))
        hidden = meet.hidden(self.sight.window, near.device)
        return Rows(meet.of_near(near), meet.of_far(far), meet.of_earlier(own.value), bias, hidden)


def _of(meet: Meet, part: Part) -> Part:
    """Of the rows after anchors."""
    return Part((meet.of_later(part.averages[0]),), meet.of_lse(part.lse))
