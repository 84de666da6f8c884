"""How much the covariance takes from the softmax average, layer by layer. Costs nothing until a layer is watched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_lighthouse import running

_watched: dict[int, Tensor | None] = {}


@contextmanager
def watching(layer_numbers: Iterable[int]) -> Iterator[None]:
    """Watch the layers with these global, 1-based numbers inside."""
    _watched.update(dict.fromkeys(layer_numbers))
    try:
        yield
    finally:
        _watched.clear()


def watched() -> dict[int, Tensor]:
    """Of each watched layer that ran in this process: [2] float64, the latest sums of squares of the covariance C and of v̄."""
    return {number: sums for number, sums in _watched.items() if sums is not None}


def record(value: Tensor, output: Tensor) -> None:
    """Called with v̄ and o of all that a rank attends to: C is what lies between. Alike in 16 bits, they have no C."""
    if (number := running.current()) in _watched:
        sums = [torch.linalg.vector_norm(x.detach(), dtype=torch.float64).square() for x in (value - output, value)]
        _watched[number] = torch.stack(sums)
