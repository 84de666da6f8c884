"""How much an attention takes, as its variant says it and the plan reads it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """What an attention takes beside dense attention over as many rows, for the plan."""

    forward: float = 1.0
    """Times as long, forward; `both`: forward and backward."""
    both: float = 1.0
    moved: float = 0.0
    """And the time of so many bytes at the datasheet's rate, for each row and channel of the queries; `moved_both` likewise."""
    moved_both: float = 0.0
    kept: float = 0.0
    """Kept for backward besides, in sizes of the queries in bf16."""
    rows_kept: float = 0.0
    """With Lighthouse around it, kept besides for each gathered row; `tokens_kept` for each token. Likewise."""
    tokens_kept: float = 0.0
    travelling_kept: float = 0.0
    """Kept besides for each row that it attends to, where these travel between ranks as they are. Likewise."""
    backward: float = 0.0
    """Held besides while its backward runs, for each row that it attends to. Likewise."""
    assumed: str | None = None
    """What the times rest on, where they were not measured here."""
