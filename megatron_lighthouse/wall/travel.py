"""What of Wall travels: keys decayed to the end of their piece. Gates stay; of each piece all ranks learn the sum.

    k̃_j = k_j exp(Σ_{j<t, of the piece} g_t)        D = Σ of all gates of a piece

A query of piece e sees a key of piece d < e as q exp(its own prefix) · k̃ exp(D_{d+1} + … + D_{e-1}): no exponent is positive.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.wall.decay import Decays, suffix, suffix_backward, summed
from megatron_lighthouse.wall.pieces import Piece

PURPOSE = "totals"
"""Of what is sent, in counts."""


@dataclass
class Call:
    """What one call of a layer knows besides its rows."""

    totals: list[Tensor] = field(default_factory=list)
    """[pieces, B, ·] of the whole sequence: the sums of the gates, and of the scalar gates where there are."""
    crossed: dict[tuple[int, ...], list[Tensor]] = field(default_factory=dict)
    """By the piece of the queries and those of the keys: the gradient of what lies between, for each of the latter."""

    def between(self, anchor: int) -> list[Tensor]:
        """Of each piece before `anchor`: the sum of the gates of those after it and before `anchor`."""
        return [suffix(total[:anchor]) for total in self.totals]

    def total_grads(self) -> list[Tensor]:
        """Of `totals`, by way of what this rank's queries saw, in float64."""
        found = [torch.zeros_like(total, dtype=torch.float64) for total in self.totals]
        for (anchor, *pieces), grads in self.crossed.items():
            for total, grad in zip(found, grads, strict=True):
                of_pieces = torch.zeros_like(total[:anchor])
                of_pieces[pieces] = grad
                total[:anchor] += suffix_backward(of_pieces)
        self.crossed.clear()
        return found


class Decayed(torch.autograd.Function):
    """(call, decays, pieces of these rows, exchange, key [n, B, G, K], *gates [n, B, heads, ·]) -> keys, scalar gates."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, decays: Decays, pieces: list[Piece], exchange: Exchange | None, key: Tensor, *gates: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.call, ctx.decays, ctx.pieces, ctx.exchange = call, decays, pieces, exchange
        ctx.save_for_backward(key, *gates)
        own = [torch.stack([x[piece.rows].sum(0, dtype=torch.float64) for piece in pieces]).to(x.dtype) for x in gates]
        call.totals = own if exchange is None else [exchange.in_order(exchange.all_gather(x, PURPOSE)) for x in own]
        scalar = (_sums(x, pieces) for x in gates[1:])
        return torch.cat([decays.decay(key[p.rows], gates[0][p.rows], after=True) for p in pieces]), *scalar

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *of_scalar: Tensor) -> tuple[Tensor | None, ...]:
        decays, pieces, exchange = ctx.decays, ctx.pieces, ctx.exchange
        key, *gates = ctx.saved_tensors
        wide = gates[0].dtype
        of_keys = [decays.decay(grad[p.rows], gates[0][p.rows], after=True, dtype=wide) for p in pieces]
        totals = ctx.call.total_grads()
        if exchange is not None:
            sums = (exchange.out_of_order(x.to(gates[0].dtype)) for x in totals)
            shares = (exchange.all_to_all(x.flatten(0, 1), PURPOSE) for x in sums)
            totals = [x.unflatten(0, (exchange.size, -1)).sum(0, dtype=torch.float64) for x in shares]
        of_gates: list[list[Tensor]] = [[] for _ in gates]
        for piece, x in zip(pieces, of_keys, strict=True):
            of_gates[0].append(decays.decay_backward(key[piece.rows], x, gates[0].shape[2], after=True))
            for found, through in zip(of_gates[1:], of_scalar, strict=True):
                found.append(suffix_backward(through[piece.rows]))
        d_gates = [
            torch.cat([x + own.to(wide) for x, own in zip(found, total, strict=True)])
            for found, total in zip(of_gates, totals, strict=True)
        ]
        d_key = torch.cat([summed(x, key.shape[2]).to(key.dtype) for x in of_keys])
        return None, None, None, None, d_key, *d_gates


def _sums(gate: Tensor, pieces: list[Piece]) -> Tensor:
    """Scalar gates from each row's next one to the end of its piece."""
    return torch.cat([suffix(gate[piece.rows]) for piece in pieces])
