"""Sizes that would work where others do not: each that is offered is tried against all rules. Integers alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

from megatron_lighthouse.lighthouse.by_length import by_length, multiples_about
from megatron_lighthouse.nearest import either

MOST = 5
"""Levels that are offered: what the paper takes."""
STEPS = 16
"""Lengths that are tried each way: each asks what the budget of that length would be."""


class Sizes(NamedTuple):
    """Of a pyramid, as the config's fields, and N and C where they are known."""

    levels: int
    pooling: int
    budget: int
    tile_budget: int
    seq_length: int = 0
    ranks: int = 1

    @property
    def window(self) -> int:
        """Tokens of a coarsest window."""
        return self.pooling ** (self.levels - 1)

    @property
    def chunks(self) -> int:
        """Chunks of the sequence that context-parallel ranks hold: two each, or all of it as one."""
        return 2 * self.ranks if self.ranks > 1 else 1

    @property
    def refined(self) -> int:
        """Gathered rows but for the coarsest: (L-1)*p*k."""
        return (self.levels - 1) * self.pooling * self.budget

    @property
    def unit(self) -> int:
        """What N must be a multiple of: whole windows in each tile and in each chunk."""
        return math.lcm(self.budget // self.tile_budget, self.chunks) * self.window

    @property
    def fit(self) -> bool:
        """Whether the budgets go together, and N, where it is known, with them and the ranks."""
        if self.tile_budget < 2 or self.tile_budget % 2 or self.budget < 1 or self.budget % self.tile_budget:
            return False
        if not self.seq_length:
            return True
        return (
            self.seq_length >= self.window * self.budget
            and self.seq_length % self.unit == 0
            and self.refined % self.chunks == 0
        )


type Allowed = Callable[[Sizes], bool]
"""What other rules say of sizes that fit."""


def anything(_: Sizes) -> bool:
    """Where there are no other rules."""
    return True


def budget_problem(sizes: Sizes, allowed: Allowed = anything) -> str | None:
    """Why the budgets do not go together, with the nearest that do."""

    def works(**changes: int) -> bool:
        tried = sizes._replace(**changes)
        return tried.fit and allowed(tried)

    budget, tile = sizes.budget, sizes.tile_budget
    other = _pair(sizes, allowed) if sizes.seq_length else "config.budget 1536 config.tile_budget 128"
    other = other or "another length, for no budget fits this one"
    if tile < 2 or tile % 2:
        tiles = _nearest(tile, 2, budget, lambda m: budget % m == 0 and works(tile_budget=m))
        return (
            f"config.tile_budget {tile} must be even and positive, for half of it goes to the queries' choice and half to the "
            f"keys': use {_either('config.tile_budget', tiles) or other}."
        )
    if budget < 1 or budget % tile:
        most = sizes.seq_length // sizes.window if sizes.seq_length else max(budget, 0) + 2 * tile
        budgets = _nearest(max(budget, 1), tile, most, lambda k: works(budget=k))
        return (
            f"config.budget {budget} must be a positive multiple of config.tile_budget {tile}: use "
            f"{_either('config.budget', budgets) or other}."
        )
    return None


def others(sizes: Sizes, allowed: Allowed) -> str:
    """The nearest settings that would work, of each kind up to two: budgets first, or levels where windows are too wide."""

    def works(**changes: int) -> bool:
        tried = sizes._replace(**changes)
        return tried.seq_length > 0 and tried.fit and allowed(tried)

    windows = max(0, sizes.seq_length) // sizes.window
    budgets = _nearest(sizes.budget, sizes.tile_budget, windows, lambda k: works(budget=k))
    offers = [_either("config.budget", budgets) or _pair(sizes, allowed)]
    if windows < sizes.chunks:  # too wide for this layout, whatever the budget
        offers = [_fewer_levels(sizes, allowed)]
    offers.append(_either("query's N", lengths(sizes, allowed)))
    if sizes.ranks > 1 and sizes.levels <= MOST:  # fewer ranks would take them, and attend to a handful of rows
        most = min(windows // 2, max(64, 2 * sizes.ranks))
        ranks = _nearest(sizes.ranks, 1, most, lambda n: works(ranks=n))
        offers.append(_either("cp_group.size()", ranks))
    return ", or ".join(filter(None, offers)) or _fewer_levels(sizes, allowed) or "other sizes"


def lengths(sizes: Sizes, allowed: Allowed = anything, unit: int = 1) -> list[int]:
    """The nearest N that would work, at most one below and one above, or the least; multiples of `unit` too."""
    unit = math.lcm(sizes.unit, unit)
    below = sizes.seq_length // unit * unit
    least = -(-max(1, sizes.window * sizes.budget) // unit) * unit

    def works(n: int) -> bool:
        tried = sizes._replace(seq_length=n)
        return n > 0 and tried.fit and allowed(tried)

    down, up = range(below, max(0, below - STEPS * unit), -unit), range(below + unit, below + STEPS * unit, unit)
    found = [n for way in (down, up) if (n := next(filter(works, way), None)) is not None]
    return found or [n for n in (least,) if works(n)]


def _pair(sizes: Sizes, allowed: Allowed) -> str:
    """A budget and a tile budget that work, where no budget does with this tile budget."""
    if sizes.seq_length < 1:
        return ""
    found = by_length(sizes.seq_length, sizes.pooling, sizes.levels)
    pairs = [(found["budget"], found["tile_budget"]), *((m, m) for m in (64, 32, 16, 8, 4, 2))]
    for k, m in pairs:
        tried = sizes._replace(budget=k, tile_budget=m)
        if (k, m) != (sizes.budget, sizes.tile_budget) and tried.fit and allowed(tried):
            return f"config.budget {k} config.tile_budget {m}"
    return ""


def _fewer_levels(sizes: Sizes, allowed: Allowed) -> str:
    """As many levels as work, with their budgets, where no budget does with these."""
    for levels in range(min(sizes.levels - 1, MOST), 1, -1) if sizes.seq_length > 0 else ():
        if pair := _pair(sizes._replace(levels=levels), allowed):
            return f"config.levels {levels} {pair}"
    return ""


def _nearest(to: int, unit: int, most: int, fits: Callable[[int], bool]) -> list[int]:
    """The two multiples of `unit`, at most `most`, that fit and lie nearest to `to`, which does not."""
    near = (n for n in multiples_about(min(to, most), unit) if n <= most)
    return sorted(islice(filter(fits, sorted(near, key=lambda n: abs(n - to))), 2))


def _either(name: str, values: list[int]) -> str:
    return f"{name} {either(values)}" if values else ""
