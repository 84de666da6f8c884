"""Lighthouse Attention as ALGORITHM.md states it, in float64 loops that share nothing with the library.

Slow on purpose: each function is one numbered step of that page. `problems` draws what to compare on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

Array = NDArray[np.float64]
Entry = tuple[int, int]
"""(level, number within the level)"""


@dataclass(frozen=True)
class Problem:
    """Sizes, options and inputs of one layer."""

    seq_length: int
    levels: int
    pooling: int
    budget: int
    tile_budget: int
    pin_first: bool = True
    batch: int = 1
    groups: int = 1
    queries_per_group: int = 1
    dim: int = 4
    ties: bool = False
    seed: int = 0

    @property
    def options(self) -> dict[str, int | bool]:
        """The arguments of the config under test."""
        return {name: getattr(self, name) for name in ("levels", "pooling", "budget", "tile_budget", "pin_first")}

    @property
    def window(self) -> int:
        """F, tokens in a coarsest window."""
        return self.pooling ** (self.levels - 1)

    def arrays(self) -> tuple[Array, Array, Array]:
        """q [N, B, H, D], k and v [N, B, G, D]. With `ties` q and k are small integers: norms repeat exactly."""
        rng = np.random.default_rng(self.seed)

        def draw(heads: int, whole: bool) -> Array:
            shape = self.seq_length, self.batch, heads, self.dim
            return rng.integers(-1, 2, shape).astype(np.float64) if whole else rng.standard_normal(shape)

        return (
            draw(self.groups * self.queries_per_group, self.ties),
            draw(self.groups, self.ties),
            draw(self.groups, whole=False),
        )


def attention(q: Array, k: Array, v: Array, problem: Problem, scale: float | None = None) -> tuple[Array, Array]:
    """Indices [B, G, S] into the concatenated pyramid, and output [N, B, H, D]."""
    _, batch, heads, dim = q.shape
    groups = k.shape[2]
    ratio = heads // groups
    scale = 1 / math.sqrt(dim) if scale is None else scale
    out = np.zeros_like(q)
    indices = [[[] for _ in range(groups)] for _ in range(batch)]
    for b in range(batch):
        for g in range(groups):
            entries = order(select(norms(q[:, b, g * ratio : (g + 1) * ratio]), norms(k[:, b, g]), problem), problem)
            indices[b][g] = [number(entry, problem) for entry in entries]
            keys, values = pool(k[:, b, g], entries, problem), pool(v[:, b, g], entries, problem)
            for h in range(g * ratio, (g + 1) * ratio):
                rows = attend(pool(q[:, b, h], entries, problem), keys, values, scale)
                out[:, b, h] = scatter(rows, entries, problem)
    return np.array(indices), out


def pool(x: Array, entries: list[Entry], problem: Problem) -> Array:
    """Step 1: the mean of each entry's window."""
    widths = [problem.pooling**level for level, _ in entries]
    return np.array([x[i * width : (i + 1) * width].mean(0) for (_, i), width in zip(entries, widths, strict=True)])


def norms(x: Array) -> list[float]:
    """Step 2, level 0: the L2 norm of each token's rows, all heads given taken as one vector."""
    return [math.sqrt(math.fsum(float(c) ** 2 for c in token.ravel())) for token in x]


def select(score_q: list[float], score_k: list[float], problem: Problem) -> list[Entry]:
    """Steps 2 and 3: coarse to fine within each tile; all candidates are gathered, m of them refined."""

    def best(scores: list[float], level: int, candidates: list[int], pin: bool) -> list[int]:
        width = problem.pooling**level
        coarse = {i: max(scores[i * width : (i + 1) * width]) for i in candidates}
        ranking = sorted(candidates, key=lambda i: (not (pin and i == 0), -coarse[i], i))
        return ranking[: problem.tile_budget // 2]

    gathered: list[Entry] = []
    tiles, top = problem.budget // problem.tile_budget, problem.levels - 1
    for tile in range(tiles):
        per_tile = problem.seq_length // tiles // problem.window
        candidates = list(range(tile * per_tile, (tile + 1) * per_tile))
        for level in range(top, 0, -1):
            gathered += [(level, i) for i in candidates]
            by_query = best(score_q, level, candidates, problem.pin_first)
            by_key = best(score_k, level, [i for i in candidates if i not in by_query], pin=False)
            candidates = [i * problem.pooling + c for i in sorted(by_query + by_key) for c in range(problem.pooling)]
        gathered += [(0, i) for i in candidates]
    return gathered


def last_token(entry: Entry, problem: Problem) -> int:
    level, i = entry
    return (i + 1) * problem.pooling**level - 1


def order(entries: list[Entry], problem: Problem) -> list[Entry]:
    """Step 4: by last token, finer first."""
    return sorted(entries, key=lambda entry: (last_token(entry, problem), entry[0]))


def number(entry: Entry, problem: Problem) -> int:
    """The entry's place in the concatenated pyramid, level 0 first."""
    level, i = entry
    return sum(problem.seq_length // problem.pooling**finer for finer in range(level)) + i


def entry_at(place: int, problem: Problem) -> Entry:
    """The inverse of `number`."""
    for level in range(problem.levels):
        length = problem.seq_length // problem.pooling**level
        if 0 <= place < length:
            return level, place
        place -= length
    raise AssertionError("not the number of an entry")


def attend(q: Array, k: Array, v: Array, scale: float) -> Array:
    """Step 5: row a attends to rows 0..a."""
    rows = np.zeros_like(q)
    for a in range(len(q)):
        logits = k[: a + 1] @ q[a] * scale
        weights = np.exp(logits - logits.max())
        rows[a] = weights @ v[: a + 1] / weights.sum()
    return rows


def scatter(rows: Array, entries: list[Entry], problem: Problem) -> Array:
    """Step 6: each row is added to the window-many positions from its window's last token on."""
    out = np.zeros((problem.seq_length, rows.shape[1]))
    for row, entry in zip(rows, entries, strict=True):
        first = last_token(entry, problem)
        for position in range(first, first + problem.pooling ** entry[0]):
            if position < problem.seq_length:
                out[position] += row
    return out


@st.composite
def problems(draw: st.DrawFn, pin_first: bool | None = None, ties: bool | None = None) -> Problem:
    """Problems that keep every rule: N is T tiles of m windows or some more; None draws either."""
    levels, pooling = draw(st.sampled_from([(2, 2), (2, 3), (2, 5), (3, 2), (3, 3), (3, 4), (4, 2), (4, 3)]))
    tile_budget, tiles, more = draw(st.sampled_from([2, 4, 6])), draw(st.integers(1, 3)), draw(st.integers(0, 4))
    return Problem(
        seq_length=tiles * (tile_budget + more) * pooling ** (levels - 1),
        levels=levels,
        pooling=pooling,
        budget=tiles * tile_budget,
        tile_budget=tile_budget,
        pin_first=draw(st.booleans()) if pin_first is None else pin_first,
        batch=draw(st.integers(1, 2)),
        groups=draw(st.integers(1, 2)),
        queries_per_group=draw(st.integers(1, 3)),
        dim=draw(st.sampled_from([1, 3, 4, 8])),
        ties=draw(st.booleans()) if ties is None else ties,
        seed=draw(st.integers(0, 2**20)),
    )
