"""What of Wall travels: keys decayed to the end of their piece. Gates stay; of each piece all ranks learn the sum.

    k̃_j = k_j exp(Σ_{j<t, of the piece} g_t)        D = Σ of all gates of a piece

A query of piece e sees a key of piece d < e as q exp(its own prefix) · k̃ exp(D_{d+1} + … + D_{e-1}): no exponent is positive.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.wall.cut import TOTALS, Piece
from megatron_lighthouse.wall.decay import Decays, joined, suffix, suffix_backward, summed, sums
from megatron_lighthouse.wall.pieces import runs


@dataclass
class Call:
    """What one call of a layer knows besides its rows."""

    totals: list[Tensor] = field(default_factory=list)
    """[pieces, B, ·] of the whole sequence, float64: the sums of the gates, and of the scalar gates where there are."""
    crossed: list[tuple[int, int, list[Tensor]]] = field(default_factory=list)
    """The piece of the queries, the first of some pieces of keys, and for each of these the gradients of what lies between."""

    def between(self, anchor: int) -> list[Tensor]:
        """Of each piece before `anchor`: the sum of the gates of those after it and before `anchor`, float64."""
        return [suffix(total[:anchor]) for total in self.totals]

    def total_grads(self) -> list[Tensor]:
        """Of `totals`, by way of what this rank's queries saw, in float64."""
        found = [torch.zeros_like(total) for total in self.totals]
        for anchor, first, grads in self.crossed:
            for total, grad in zip(found, grads, strict=True):
                before, end = grad.cumsum(0), first + len(grad)
                total[first + 1 : end] += before[:-1]
                if end < anchor:
                    total[end:anchor] += before[-1]
        self.crossed.clear()
        return found


def by_runs(pieces: list[Piece], function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """What `function` makes of these rows of pieces of so many rows, one after the other."""
    return joined([function(*(x[run.rows] for x in tensors), step=run.step) for run in runs(pieces)])


class Decayed(torch.autograd.Function):
    """(call, decays, pieces of these rows, exchange, key [n, B, G, K], *gates [n, B, heads, ·]) -> keys, scalar gates."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, decays: Decays, pieces: list[Piece], exchange: Exchange | None, key: Tensor, *gates: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.call, ctx.decays, ctx.pieces, ctx.exchange = call, decays, pieces, exchange
        ctx.save_for_backward(key, *gates)
        own = [by_runs(pieces, decays.sums, gates[0]), *(by_runs(pieces, sums, x) for x in gates[1:])]
        if exchange is not None:
            own = [exchange.in_order(exchange.all_gather(x.to(gates[0].dtype), TOTALS)) for x in own]
        call.totals = [x.double() for x in own]
        scalar = (torch.cat([suffix(x[piece.rows]) for piece in pieces]) for x in gates[1:])
        return by_runs(pieces, partial(decays.decay, after=True), key, gates[0]), *scalar

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *of_scalar: Tensor) -> tuple[Tensor | None, ...]:
        decays, pieces, exchange = ctx.decays, ctx.pieces, ctx.exchange
        key, *gates = ctx.saved_tensors
        wide = gates[0].dtype
        of_keys = by_runs(pieces, partial(decays.decay, after=True, dtype=wide), grad, gates[0])
        totals = ctx.call.total_grads()
        if exchange is not None:
            sums = (exchange.out_of_order(x.to(gates[0].dtype)) for x in totals)
            shares = (exchange.all_to_all(x.flatten(0, 1), TOTALS) for x in sums)
            totals = [x.unflatten(0, (exchange.size, -1)).sum(0, dtype=torch.float64) for x in shares]
        found = [by_runs(pieces, partial(decays.decay_backward, heads=gates[0].shape[2], after=True), key, of_keys)]
        found += [torch.cat([suffix_backward(x[piece.rows]) for piece in pieces]) for x in of_scalar]
        for x, total in zip(found, totals, strict=True):
            for piece, own in zip(pieces, total.to(wide), strict=True):
                x[piece.rows] += own
        return None, None, None, None, summed(of_keys, key.shape[2]).to(key.dtype), *found
