"""How much an attention takes, as its variant says it and the plan reads it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """What an attention takes beside dense attention over as many rows, for the plan."""

    forward: float = 1.0
    """Times as long, forward; `both`: forward and backward."""
    both: float = 1.0
    kept: int = 0
    """Kept for backward besides, in sizes of the queries."""
    assumed: str | None = None
    """What the times rest on, where they were not measured here."""
