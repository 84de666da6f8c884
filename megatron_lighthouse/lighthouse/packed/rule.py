"""How many rows a document becomes: of its length alone (ours), so that all heads have as many, and the host knows them.

A document's windows begin at its first token, and all are whole: the n mod F tokens that do not fill a coarsest window of
F = p^(L-1), its tail, go in as they are, each a row of its own. A short document goes in whole: it is all tail.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from megatron_lighthouse.lighthouse.config import LighthouseConfig


class Tile(NamedTuple):
    """Some coarsest windows of a document, among which a budget is spent."""

    windows: int
    budget: int
    """Entries refined per level: the m of this tile."""


def rule_problem(config: LighthouseConfig) -> str | None:
    """Why the rule that a config asks for cannot be kept; None where it can."""
    window = config.pooling ** (config.levels - 1)
    least = config.tile_budget * window
    if config.document_tile and (config.document_tile < least or config.document_tile % window):
        above = max(least, -(-config.document_tile // window) * window)
        return (
            f"config.document_tile {config.document_tile} must be a multiple of {window}, the tokens of a coarsest window, and "
            f"at least {least}, one window for each entry of config.tile_budget {config.tile_budget}: use {above}."
        )
    return f"config.whole_below {config.whole_below} must not be negative: use 0." if config.whole_below < 0 else None


class Counts(NamedTuple):
    """What a document becomes."""

    windows: int
    """Coarsest windows in tiles; 0 where it goes in whole, as is all that follows but `rows`."""
    rows: int
    """S_d."""
    tiles: int
    last: Tile
    """The last of these. All others are full."""


@dataclass(frozen=True)
class Rule:
    """The part of a `LighthouseConfig` that documents go by."""

    levels: int
    pooling: int
    tile_budget: int
    """m, entries refined per level within a tile of `tile_windows`."""
    tile_windows: int
    whole_below: int
    """Tokens: shorter documents go in whole."""

    @cached_property
    def window(self) -> int:
        """F, tokens of a coarsest window."""
        return self.pooling ** (self.levels - 1)

    def tiles(self, tokens: int) -> tuple[Tile, ...]:
        """The tiles of a document of so many `tokens`, from its first; none where it goes in whole.

        All have `tile_windows` windows but the last, whose budget is its share of m: even, at least 2 and at most its windows.
        """
        found = self.counts(tokens)
        return (*[Tile(self.tile_windows, self.tile_budget)] * (found.tiles - 1), found.last) if found.tiles else ()

    def rows(self, tokens: int) -> int:
        """S_d, the rows of a document of so many tokens: at most its tokens."""
        return self.counts(tokens).rows

    def counts(self, tokens: int) -> Counts:
        """What a document of so many tokens becomes."""
        windows, tail = divmod(tokens, self.window)
        full, rest = divmod(windows, self.tile_windows)
        last, budget = Tile(self.tile_windows, self.tile_budget), full * self.tile_budget
        if rest:
            share = self.tile_budget * rest // (2 * self.tile_windows) * 2
            last = Tile(rest, min(max(2, share), rest))
            budget += last.budget
        # all coarsest windows, p children of each refined one, and the tail
        rows = windows + (self.levels - 1) * self.pooling * budget + tail
        if tokens < self.whole_below or rows >= tokens:
            return Counts(0, tokens, 0, Tile(0, 0))
        return Counts(windows, rows, full + (rest > 0), last)
