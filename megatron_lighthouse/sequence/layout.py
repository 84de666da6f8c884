"""Zigzag arithmetic: which chunks of the sequence a context-parallel rank holds. Integers only.

A sequence of N tokens is cut into 2C equal chunks for C ranks; rank r holds chunk r and chunk 2C-1-r, one after the other. So
each rank holds an early and a late chunk, and causal attention costs all of them the same.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """One rank's place among the context-parallel ranks."""

    size: int
    """C, ranks."""
    rank: int

    @property
    def chunks(self) -> tuple[int, int]:
        """The two chunks of this rank, in the order in which it holds them."""
        return self.rank, 2 * self.size - 1 - self.rank

    def owner(self, chunk: int) -> int:
        """The rank that holds `chunk`."""
        return min(chunk, 2 * self.size - 1 - chunk)

    def order(self) -> list[int]:
        """Where each chunk of the sequence stands when the ranks' tokens are laid end to end: a permutation of 0..2C-1."""
        return [2 * self.owner(chunk) + (chunk >= self.size) for chunk in range(2 * self.size)]
