"""How much the covariance takes from the softmax average, layer by layer. Costs nothing until a layer is watched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from megatron_lighthouse import running
from megatron_lighthouse.lighthouse.geometry import Shape

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


class Corrections:
    """By layer: the norm of what is subtracted over that of the softmax average, of all tokens and heads."""

    def watching(self, layers: Iterable[int]) -> AbstractContextManager[None]:
        return watching(layers)

    def sums(self, layers: Sequence[int], shape: Shape, rank: int, ranks: int) -> Tensor:
        """[layers, 2], of the iteration's last micro-batch."""
        found = watched()
        device = next((sums.device for sums in found.values()), None)
        return torch.stack([found.get(layer, torch.zeros(2, dtype=torch.float64, device=device)) for layer in layers])

    def scalars(self, layers: Sequence[int], sums: Tensor) -> dict[str, float]:
        return {
            f"parallax/correction/layer-{layer}": (covariance / value) ** 0.5
            for layer, (covariance, value) in zip(layers, sums.tolist(), strict=True)
            if value
        }

    def draw(self, scalars: dict[str, float], folder: Path, iteration: int) -> None:
        """None: a number a layer is a curve."""
