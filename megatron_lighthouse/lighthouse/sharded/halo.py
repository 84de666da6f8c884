"""Halo: what the last windows of a chunk spill past its end, sent to the rank that holds the chunk that follows.

Not sums travel but rows: at most one a level, of the entry that ends where the chunk ends. So the receiver adds all levels in
fp32 and rounds once, as one rank does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_lighthouse.context_parallel.exchange import Exchange, finish
from megatron_lighthouse.gpu import triton_takes
from megatron_lighthouse.lighthouse.selection import Selection
from megatron_lighthouse.once import once_differentiable


def with_halo(rows: Tensor, selection: Selection, exchange: Exchange) -> tuple[Tensor, Tensor, HaloTravel]:
    """`rows` [S, B, H, D], and the rows that end where this rank's chunks begin: [2, L-1, B, H, D], zero where not gathered.

    These are still under way: `Steps.scatter` waits for them. Differentiable: the gradient of the halo returns, and is added
    to that of the rows.
    """
    travel = HaloTravel(exchange)
    rows, halo = _Halo.apply(rows, selection, travel)
    return rows, halo, travel


class HaloTravel:
    """The halo on its way from the rank before a chunk to the chunk's rank, or its gradient back."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.works: list[Any] = []
        self.edges: Tensor | None = None

    def send(self, edges: Tensor) -> Tensor:
        """Begin to send the rows that this rank's chunks end with; `arrive` before the result is read."""
        halo, self.works = _shift(edges, self.exchange, forward=True)
        return halo

    def arrive(self) -> None:
        finish(self.works)
        self.works = []

    def send_back(self, grad: Tensor) -> None:
        self.edges, self.works = _shift(grad, self.exchange, forward=False)

    def returned(self, grad: Tensor) -> Tensor:
        """The gradients of the rows that this rank's chunks end with, for those of its halo."""
        if self.edges is None:
            self.send_back(grad)
        edges, self.edges = self.edges, None
        self.arrive()
        assert edges is not None
        return edges


class _Halo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, selection: Selection, travel: HaloTravel) -> tuple[Tensor, Tensor]:
        ctx.selection, ctx.travel = selection, travel
        return rows, travel.send(edge(rows, selection))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_halo: Tensor) -> tuple[Tensor, None, None]:
        # in place: `grad` is what scatter's backward has just made
        add_edge(grad, ctx.travel.returned(grad_halo), ctx.selection)
        return grad, None, None


def edge(rows: Tensor, selection: Selection) -> Tensor:
    """The rows of the last entry of each chunk at levels 1..L-1: [chunks, L-1, B, H, D], zero where not gathered."""
    if triton_takes(rows):
        from megatron_lighthouse.kernels.lighthouse.edge import edge as kernel

        return kernel(rows, selection.places, selection.sizes)
    places, index = _places_of_edge(rows, selection)
    return rows[index].masked_fill((places < 0).unsqueeze(-1), 0)


def add_edge(rows: Tensor, edges: Tensor, selection: Selection) -> None:
    """Add `edges`, as `edge` gives them, to their rows in place; those of entries that are not gathered go nowhere."""
    if triton_takes(rows):
        from megatron_lighthouse.kernels.lighthouse.edge import add_edge as kernel

        return kernel(rows, edges, selection.places, selection.sizes)
    places, index = _places_of_edge(rows, selection)
    found = places >= 0
    index = tuple(x.expand(places.shape)[found] for x in index)
    rows[index] += edges[found]
    return None


def _places_of_edge(rows: Tensor, selection: Selection) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The place of each row of the edge [chunks, L-1, B, H], and what indexes `rows` by it."""
    last = selection.last_places
    places = last.repeat_interleave(rows.shape[2] // last.shape[3], 3).long()
    batch, head = (torch.arange(n, device=rows.device) for n in rows.shape[1:3])
    return places, (places.clamp(min=0), batch.unsqueeze(1), head)


def _shift(x: Tensor, exchange: Exchange, forward: bool) -> tuple[Tensor, list[Any]]:
    """x [2, ...] of each chunk, moved to the chunk after it in the sequence (or before it), zeros in; and what to wait for.

    Chunk r of rank r is followed by chunk r+1 of rank r+1, chunk 2C-1-r by chunk 2C-r of rank r-1; the middle two are both
    of the last rank.
    """
    x, rank, last = x.contiguous(), exchange.rank, exchange.size - 1
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
    return out, exchange.start(sends, receives, "halo")
