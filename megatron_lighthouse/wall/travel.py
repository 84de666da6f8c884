"""What of Wall travels: keys decayed to the end of their piece. Gates stay; of each piece all ranks learn the sum.

    k̃_j = k_j exp(Σ_{j<t, of the piece} g_t)        D = Σ of all gates of a piece

A query of piece e sees a key of piece d < e as q exp(its own prefix) · k̃ exp(D_{d+1} + … + D_{e-1}): no exponent is positive.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.once import once_differentiable
from megatron_lighthouse.wall.cut import TOTALS, Piece
from megatron_lighthouse.wall.decay import Decays, joined, suffix, suffix_backward, summed
from megatron_lighthouse.wall.pieces import Run, runs


@dataclass
class Call:
    """What one call of a layer knows besides its rows."""

    totals: list[Tensor] = field(default_factory=list)
    """[pieces, B, ·] of the whole sequence, float64: the sums of the gates, and of the scalar gates where there are."""
    tile_sums: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)
    """Of the gates of runs, by their first piece, their rows, and the step: see `Decays.tile_sums`."""
    of_totals: list[Tensor] = field(default_factory=list)
    """The gradients of `totals` by way of what this rank's queries have seen, likewise; none before a backward pass."""

    def tile_sums_of(self, decays: Decays, gate: Tensor, run: Run) -> Tensor:
        """Made once, for the passes there and back. `gate`: rows among which those of the run are."""
        which = run.number, run.rows.stop - run.rows.start, run.step
        if which not in self.tile_sums:
            self.tile_sums[which] = decays.tile_sums(gate[run.rows], run.step)
        return self.tile_sums[which]

    def decayed(self, decays: Decays, pieces: list[Piece], x: Tensor, gate: Tensor, after: bool, dtype: torch.dtype) -> Tensor:
        """The rows of these pieces, one after the other, decayed: see `Decays.decay`."""
        found = runs(pieces)
        rows, heads = found[-1].taken.stop if found else 0, max(x.shape[2], gate.shape[2])
        out = torch.empty(rows, x.shape[1], heads, x.shape[3], dtype=dtype, device=x.device)
        for run in found:
            tile_sums = self.tile_sums_of(decays, gate, run)
            decays.decay(out[run.taken], x[run.rows], gate[run.rows], tile_sums, after, run.step)
        return out

    def total_grads(self) -> list[Tensor]:
        """`of_totals`, to add to."""
        self.of_totals = self.of_totals or [torch.zeros_like(total) for total in self.totals]
        return self.of_totals

    def begin_anew_with(self, attended: Tensor) -> None:
        """Of each backward pass through `attended`: one for some inputs alone leaves what the gates' would have taken."""
        if attended.grad_fn is not None:
            attended.grad_fn.register_prehook(lambda _: self.of_totals.clear())


class Decayed(torch.autograd.Function):
    """(call, decays, pieces of these rows, exchange, key [n, B, G, K], *gates [n, B, heads, ·]) -> keys, scalar gates."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, decays: Decays, pieces: list[Piece], exchange: Exchange | None, key: Tensor, *gates: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.call, ctx.decays, ctx.pieces, ctx.exchange = call, decays, pieces, exchange
        ctx.save_for_backward(key, *gates)
        tile_sums = joined([call.tile_sums_of(decays, gates[0], run) for run in runs(pieces)])
        own = [tile_sums.sum(1, dtype=torch.float64)]
        own += [torch.stack([x[piece.rows].sum(0, dtype=torch.float64) for piece in pieces]) for x in gates[1:]]
        if exchange is not None:
            own = [exchange.whole(x.to(gates[0].dtype), TOTALS) for x in own]
        call.totals = [x.double() for x in own]
        scalar = (torch.cat([suffix(x[piece.rows]) for piece in pieces]) for x in gates[1:])
        return call.decayed(decays, pieces, key, gates[0], after=True, dtype=key.dtype), *scalar

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *of_scalar: Tensor) -> tuple[Tensor | None, ...]:
        decays, pieces, exchange = ctx.decays, ctx.pieces, ctx.exchange
        key, *gates = ctx.saved_tensors
        of_keys = ctx.call.decayed(decays, pieces, grad, gates[0], after=True, dtype=gates[0].dtype)
        totals = ctx.call.total_grads()
        if exchange is not None:
            sums = (exchange.out_of_order(x.to(gates[0].dtype)) for x in totals)
            shares = (exchange.all_to_all(x.flatten(0, 1), TOTALS) for x in sums)
            totals = [x.unflatten(0, (exchange.size, -1)).sum(0, dtype=torch.float64) for x in shares]
        found = [_each(pieces, total.to(gates[0].dtype)) for total in totals]
        for run in runs(pieces):
            decays.decay_backward(found[0][run.rows], key[run.rows], of_keys[run.taken], after=True, step=run.step)
        for x, of_gates in zip(of_scalar, found[1:], strict=True):
            for piece in pieces:
                of_gates[piece.rows].add_(suffix_backward(x[piece.rows]))
        return None, None, None, None, summed(of_keys, key.shape[2]).to(key.dtype), *found


def _each(pieces: list[Piece], totals: Tensor) -> Tensor:
    """For each row of the pieces that of its piece."""
    found, first = [], 0
    for run in runs(pieces):
        found.append(totals[first : first + run.pieces].repeat_interleave(run.step, 0)[: run.rows.stop - run.rows.start])
        first += run.pieces
    return joined(found)
