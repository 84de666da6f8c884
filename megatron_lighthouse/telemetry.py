"""Telemetry: what selection did. Costs nothing until a layer is watched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.geometry import Pyramid
from megatron_lighthouse.selection import Selection

_watched: dict[int, Selection | None] = {}
_current: int | None = None


def watch(layer_number: int) -> None:
    """Keep the latest selection of the layer with this global, 1-based number."""
    _watched.setdefault(layer_number, None)


def watched() -> dict[int, Selection]:
    """The latest selection of each watched layer that ran in this process."""
    return {number: selection for number, selection in _watched.items() if selection is not None}


@contextmanager
def layer(number: int) -> Iterator[None]:
    """Name the layer whose attention runs inside."""
    global _current
    _current, before = number, _current
    try:
        yield
    finally:
        _current = before


def record(selection: Selection) -> None:
    """Called by the attention with every selection it made."""
    if _current in _watched:
        _watched[_current] = selection


def whole(selection: Selection, exchange: Exchange | None) -> Selection:
    """The selection of the whole sequence, from those of its context-parallel ranks, which all call this.

    Rows are not numbered anew: gathered entries have place 0.
    """
    if exchange is None:
        return selection
    geometry, places = selection.geometry, []
    for rows in selection.rows:
        gathered = (rows >= 0).to(torch.int32).movedim(-1, 0)
        places.append(exchange.in_order(exchange.all_gather(gathered, "telemetry")).movedim(0, -1) - 1)
    wide = Pyramid(geometry.seq_length * exchange.size, geometry.levels, geometry.pooling)
    length = int((torch.cat(places, -1) >= 0).sum(-1).max())
    return Selection(wide, torch.cat(places, -1), length)


def entries_by_level(selection: Selection) -> list[float]:
    """Gathered entries of each level, finest first, averaged over batch elements and heads."""
    return [(rows >= 0).sum(-1).double().mean().item() for rows in selection.rows]


def coverage(selection: Selection) -> list[float]:
    """Share of the tokens that lie in a gathered entry of each level, finest first; the coarsest is always 1."""
    return [(rows >= 0).double().mean().item() for rows in selection.rows]
