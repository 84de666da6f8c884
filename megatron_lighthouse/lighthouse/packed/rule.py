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
        if tokens < self.whole_below:
            return ()
        full, rest = divmod(tokens // self.window, self.tile_windows)
        tiles = [Tile(self.tile_windows, self.tile_budget)] * full
        if rest:
            share = self.tile_budget * rest // (2 * self.tile_windows) * 2
            tiles.append(Tile(rest, min(max(2, share), rest)))
        return tuple(tiles) if self._rows(tiles) + tokens % self.window < tokens else ()

    def rows(self, tokens: int) -> int:
        """S_d, the rows of a document of so many tokens: at most its tokens."""
        tiles = self.tiles(tokens)
        return self._rows(tiles) + tokens % self.window if tiles else tokens

    def _rows(self, tiles: tuple[Tile, ...] | list[Tile]) -> int:
        """All coarsest windows, and p children of each refined one."""
        return sum(tile.windows + (self.levels - 1) * self.pooling * tile.budget for tile in tiles)
