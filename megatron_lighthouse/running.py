"""The layer whose attention runs now, by its global, 1-based number; and what watched layers record of themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from megatron_lighthouse.lighthouse.geometry import Shape

_current: int | None = None


class layer:
    """Name the layer whose attention runs inside."""

    def __init__(self, number: int) -> None:
        self.number, self.before = number, _current

    def __enter__(self) -> None:
        global _current
        _current = self.number

    def __exit__(self, *_: object) -> None:
        global _current
        _current = self.before


def current() -> int | None:
    """The layer that runs; None outside of all."""
    return _current


class Watched[T]:
    """What layers record of themselves while they are watched, by their numbers."""

    def __init__(self) -> None:
        self.records: dict[int, T | None] = {}

    def watch(self, layer_number: int) -> None:
        """Keep what the layer with this global, 1-based number records from now on."""
        self.records.setdefault(layer_number, None)

    @contextmanager
    def watching(self, layer_numbers: Iterable[int]) -> Iterator[None]:
        """Watch these layers inside, and forget what they recorded afterwards; those that were watched before stay so."""
        added = [number for number in layer_numbers if number not in self.records]
        for number in added:
            self.watch(number)
        try:
            yield
        finally:
            for number in added:
                del self.records[number]

    def found(self) -> dict[int, T]:
        """Of each watched layer that ran in this process."""
        return {number: record for number, record in self.records.items() if record is not None}


class Telemetry(Protocol):
    """What layers record of themselves while they are watched, and what is logged of it."""

    def watching(self, layers: Iterable[int]) -> AbstractContextManager[None]:
        """Inside, the layers with these global, 1-based numbers are watched."""

    def sums(self, layers: Sequence[int], shape: Shape, rank: int, ranks: int) -> Tensor:
        """What this tensor-parallel rank of so many recorded: float64, on any device, which adds up over all ranks of a run.

        Args:
            shape: of the layers' inputs, all ranks' heads together.
        """

    def scalars(self, layers: Sequence[int], sums: Tensor) -> dict[str, float]:
        """By name, of the sums of all ranks, on the CPU."""

    def draw(self, scalars: dict[str, float], folder: Path, iteration: int) -> None:
        """A picture of these at the end of a run, where one says more than its curves."""
