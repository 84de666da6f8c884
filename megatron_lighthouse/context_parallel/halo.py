"""Halo: what the last windows of a chunk spill past its end, sent to the rank that holds the chunk that follows.

Not sums travel but rows: at most one a level, of the entry that ends where the chunk ends. So the receiver adds all levels in
fp32 and rounds once, as one rank does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_lighthouse.context_parallel.exchange import Exchange, finish
from megatron_lighthouse.selection import Selection


def halo_of(rows: Tensor, selection: Selection, exchange: Exchange) -> Tensor:
    """The rows that end where this rank's chunks begin: [S, B, H, D] -> [2, L-1, B, H, D], zero where not gathered.

    Differentiable: its mirror image in backward.
    """
    halo: Tensor = _Halo.apply(rows, selection, exchange)
    return halo


class _Halo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, selection: Selection, exchange: Exchange) -> Tensor:
        places = selection.last_places  # [2, L-1, B, G]
        heads = rows.shape[2] // places.shape[3]
        places = places.repeat_interleave(heads, 3).long()
        ctx.save_for_backward(places)
        ctx.exchange, ctx.length = exchange, rows.shape[0]
        batch, head = (torch.arange(n, device=rows.device) for n in rows.shape[1:3])
        last = rows[places.clamp(min=0), batch.unsqueeze(1), head]
        return _shift(last.masked_fill_((places < 0).unsqueeze(-1), 0), exchange, forward=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        last = _shift(grad.contiguous(), ctx.exchange, forward=False)
        rows = last.new_zeros(ctx.length + 1, *last.shape[2:])  # one behind the end, for the rows of entries not gathered
        batch, head = (torch.arange(n, device=last.device) for n in last.shape[2:4])
        rows[places.where(places >= 0, ctx.length), batch.unsqueeze(1), head] = last
        return rows[: ctx.length], None, None


def _shift(x: Tensor, exchange: Exchange, forward: bool) -> Tensor:
    """x [2, ...] of each chunk, moved to the chunk after it in the sequence (or before it); zeros come in at the end.

    Chunk r of rank r is followed by chunk r+1 of rank r+1, chunk 2C-1-r by chunk 2C-r of rank r-1; the middle two are both
    of the last rank.
    """
    rank, last = exchange.rank, exchange.size - 1
    out = torch.zeros_like(x)
    # forward, the early chunk goes up a rank and the late chunk down; backward the other way round
    up, down = (0, 1) if forward else (1, 0)
    sends, receives = [], []
    if rank < last:
        sends.append((x[up], rank + 1))
        receives.append((out[down], rank + 1))
    else:
        out[down] = x[up]
    if rank > 0:
        sends.append((x[down], rank - 1))
        receives.append((out[up], rank - 1))
    finish(exchange.start(sends, receives, "halo"))
    return out
