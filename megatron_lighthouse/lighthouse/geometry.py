"""The integers of Lighthouse: levels, windows, tiles, places and spill. No tensors, no torch.

Vocabulary: entry (l, i) of level l is the window of tokens [i*p^l, (i+1)*p^l). The concatenated pyramid
numbers all entries, level 0 first. `Geometry` comes from `LighthouseConfig.geometry`, which checks it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Pyramid:
    """Windows of some tokens: of a whole sequence, or of what one context-parallel rank holds of it."""

    seq_length: int
    """N, tokens."""
    levels: int
    """L."""
    pooling: int
    """p."""

    @property
    def pyramid(self) -> tuple[int, int, int]:
        """(N, L, p): what makes a Pyramid again."""
        return self.seq_length, self.levels, self.pooling

    @cached_property
    def pyramid_length(self) -> int:
        """Entries of all levels together."""
        return self.offset(self.levels)

    @cached_property
    def coarse_length(self) -> int:
        """Entries of levels 1..L-1 together: those that are scored."""
        return self.pyramid_length - self.seq_length

    @property
    def tile(self) -> int:
        """Coarsest windows of a tile: all of them, where nothing says otherwise."""
        return self.entries(self.levels - 1)

    def window(self, level: int) -> int:
        """Tokens in a window of `level`: p^l."""
        return self.pooling**level

    def entries(self, level: int) -> int:
        """Entries of `level`: N/p^l."""
        return self.seq_length // self.window(level)

    @property
    def level_lengths(self) -> list[int]:
        """Entries of each level, finest first."""
        return [self.entries(level) for level in range(self.levels)]

    def offset(self, level: int) -> int:
        """The number that entry (level, 0) has in the concatenated pyramid."""
        return sum(self.entries(l) for l in range(level))

    def spill(self, level: int) -> range:
        """Positions that entry (level, 0) adds to, as offsets from its window's first token.

        Source: the paper's shifted scatter. A window's row is complete at its last token, and is
        added to that position and the p^l - 1 that follow, so that position j receives from level l
        exactly the entry (j - p^l + 1) // p^l.
        """
        window = self.window(level)
        return range(window - 1, 2 * window - 1)

    def entries_ending_before(self, level: int, position: Any, other: int) -> Any:
        """How many entries of `other` stand before an entry of `level` whose window ends at `position` (exclusive).

        The causal order sorts by (last token, level), finer first: at the same last token a finer entry stands before a
        coarser one. `position` is an integer or a tensor of integers, and so is the answer.
        """
        if other < level:
            return position // self.window(other)
        return (position - 1) // self.window(other)


@dataclass(frozen=True)
class Tiled(Pyramid):
    """Windows that are selected from tile by tile: of a rank's share of a sequence, or of one packed document."""

    tile_windows: int
    """Coarsest windows of a tile, counted from the first token of the sequence; a document's last tile may have fewer."""

    @property
    def tile(self) -> int:
        return self.tile_windows


@dataclass(frozen=True)
class Geometry(Pyramid):
    """Sizes of one layer at one sequence length. All counts are per batch element and key/value head."""

    budget: int
    """k, entries refined per level."""
    tile_budget: int
    """m, entries refined per level and tile."""

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """(N, L, p, k, m): what makes a Geometry again."""
        return self.seq_length, self.levels, self.pooling, self.budget, self.tile_budget

    @property
    def tiles(self) -> int:
        """T = k/m."""
        return self.budget // self.tile_budget

    @property
    def tile(self) -> int:
        return self.entries(self.levels - 1) // self.tiles

    def is_local(self, ranks: int) -> bool:
        """Whether every tile lies in one of the 2C chunks of `ranks` ranks."""
        return self.tiles % (2 * ranks) == 0

    @property
    def gathered_length(self) -> int:
        """S = N/p^(L-1) + (L-1)*p*k: every coarsest entry, and p children of each refined entry."""
        return self.entries(self.levels - 1) + (self.levels - 1) * self.pooling * self.budget


@dataclass(frozen=True)
class Shape:
    """The shape of one layer's inputs on one rank."""

    batch: int
    heads: int
    """H, query heads of a tensor-parallel rank."""
    groups: int
    """G, key/value heads of a tensor-parallel rank."""
    dim: int
    itemsize: int
    """Bytes of an element of Q, K and V."""
    value_dim: int = 0
    """Of values, where it is not `dim`."""
    heads_per_selection: int = 1
    """Key/value heads that share one."""

    @property
    def values(self) -> int:
        """Channels of a value, and of the output."""
        return self.value_dim or self.dim
