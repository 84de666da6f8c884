"""Which layer's attention runs, by its global, 1-based number: what is recorded of it is told apart so."""

from __future__ import annotations

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
