"""Lighthouse over packed documents as docs/algorithm.md states it, in float64 loops, one document after the other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from hypothesis import strategies as st

from tests import oracle
from tests.oracle import Array, Entry, Problem


@dataclass(frozen=True)
class Packed(Problem):
    """A row of documents. `seq_length` and `budget` are not read."""

    lengths: tuple[int, ...] = ()
    tile_windows: int = 8
    whole_below: int = 0

    @property
    def options(self) -> dict[str, int | bool]:
        """The arguments of the config under test."""
        names = ("levels", "pooling", "tile_budget", "pin_first", "whole_below")
        tile = self.tile_windows * self.window
        return {name: getattr(self, name) for name in names} | {"budget": self.tile_budget, "document_tile": tile}

    @property
    def bounds(self) -> list[int]:
        """cu_seqlens."""
        return [sum(self.lengths[:i]) for i in range(len(self.lengths) + 1)]


def of(lengths: tuple[int, ...], **options: int | bool) -> Packed:
    """A problem of these documents."""
    given = {"levels": 3, "pooling": 2, "tile_budget": 2, "groups": 2, "queries_per_group": 2, "budget": 0} | options
    return Packed(seq_length=sum(lengths), lengths=lengths, **given)


def attention(q: Array, k: Array, v: Array, packed: Packed) -> tuple[list[list[tuple[int, Entry]]], Array]:
    """The gathered entries of each group, as (document, entry) in order; and the output [t, 1, H, D]."""
    ratio, scale = q.shape[2] // k.shape[2], 1 / math.sqrt(q.shape[3])
    out = np.zeros_like(q)
    chosen: list[list[tuple[int, Entry]]] = [[] for _ in range(k.shape[2])]
    for d, (start, end) in enumerate(pairwise(packed.bounds)):
        document = slice(start, end)
        alone = Problem(end - start, packed.levels, packed.pooling, 0, 0, packed.pin_first)
        for g in range(k.shape[2]):
            queries, keys = q[document, 0, g * ratio : (g + 1) * ratio], k[document, 0, g]
            entries = select(oracle.norms(queries), oracle.norms(keys), packed)
            chosen[g] += [(d, entry) for entry in entries]
            rows_k, rows_v = (oracle.pool(x, entries, alone) for x in (keys, v[document, 0, g]))
            for h in range(ratio):
                rows = oracle.attend(oracle.pool(queries[:, h], entries, alone), rows_k, rows_v, scale)
                out[document, 0, g * ratio + h] = oracle.scatter(rows, entries, alone)
    return chosen, out


def select(score_q: list[float], score_k: list[float], packed: Packed) -> list[Entry]:
    """The entries of one document, in causal order."""
    tokens, width = len(score_q), packed.window
    windows, entries = list(range(tokens // width)), list[Entry]()
    for first in range(0, len(windows), packed.tile_windows):
        entries += _of_tile(windows[first : first + packed.tile_windows], score_q, score_k, packed)
    tail = [(0, j) for j in range(len(windows) * width, tokens)]
    if tokens < packed.whole_below or len(entries) + len(tail) >= tokens:
        return [(0, j) for j in range(tokens)]
    return oracle.order(entries, packed) + tail


def _of_tile(candidates: list[int], score_q: list[float], score_k: list[float], packed: Packed) -> list[Entry]:
    share = packed.tile_budget * len(candidates) / packed.tile_windows
    budget = min(max(2, 2 * math.floor(share / 2)), len(candidates))

    def best(scores: list[float], level: int, among: list[int], count: int, pin: bool) -> list[int]:
        width = packed.pooling**level
        ranking = sorted(among, key=lambda i: (not (pin and i == 0), -max(scores[i * width : (i + 1) * width]), i))
        return ranking[:count]

    gathered: list[Entry] = []
    for level in range(packed.levels - 1, 0, -1):
        gathered += [(level, i) for i in candidates]
        by_query = best(score_q, level, candidates, math.ceil(budget / 2), packed.pin_first)
        by_key = best(score_k, level, [i for i in candidates if i not in by_query], budget // 2, False)
        candidates = [i * packed.pooling + c for i in sorted(by_query + by_key) for c in range(packed.pooling)]
    return gathered + [(0, i) for i in candidates]


@st.composite
def rows(draw: st.DrawFn) -> Packed:
    """Rows of documents of every kind: of one token, of equal lengths, one alone, very many, and what divides nothing."""
    levels, pooling = draw(st.sampled_from([(2, 2), (2, 3), (3, 2), (3, 3), (4, 2)]))
    tile_budget, some = draw(st.sampled_from([2, 4])), st.integers(1, 60)
    lengths = draw(
        st.one_of(
            st.lists(some, min_size=1, max_size=5),
            st.integers(1, 120).map(lambda n: [n]),
            st.tuples(some, st.integers(1, 4)).map(lambda x: [x[0]] * x[1]),
            st.lists(st.integers(1, 3), min_size=30, max_size=100),
        )
    )
    return Packed(
        seq_length=sum(lengths),
        levels=levels,
        pooling=pooling,
        budget=0,
        tile_budget=tile_budget,
        pin_first=draw(st.booleans()),
        groups=draw(st.integers(1, 2)),
        queries_per_group=draw(st.integers(1, 2)),
        dim=draw(st.sampled_from([1, 4])),
        ties=draw(st.booleans()),
        seed=draw(st.integers(0, 2**20)),
        lengths=tuple(lengths),
        tile_windows=draw(st.integers(tile_budget, 4 * tile_budget)),
        whole_below=draw(st.sampled_from([0, 0, 20])),
    )
