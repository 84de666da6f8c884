"""Which layer's attention runs, by its global, 1-based number: what is recorded of it is told apart so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_current: int | None = None


@contextmanager
def layer(number: int) -> Iterator[None]:
    """Name the layer whose attention runs inside."""
    global _current
    _current, before = number, _current
    try:
        yield
    finally:
        _current = before


def current() -> int | None:
    """The layer that runs; None outside of all."""
    return _current
