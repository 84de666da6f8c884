"""A causal selection as `lighthouse.causal` states it, token after token: nothing is decided before its time. Float64 loops."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tests.oracle import Array, Entry, Problem, attend, last_token, norms, number, order, pool, scatter


@dataclass
class Share:
    """Some windows of a tile, `count` in all, of which `wanted` are refined, one after the other."""

    wanted: int
    count: int
    scores: list[float] = field(default_factory=list)
    taken: int = 0

    def takes(self, score: float) -> bool:
        """Whether the next window is refined."""
        must = self.wanted - self.taken == self.count - len(self.scores)
        above = sum(earlier >= score for earlier in self.scores) * self.count < self.wanted * (len(self.scores) + 1)
        self.scores.append(score)
        taken = must or (above and self.taken < self.wanted)
        self.taken += taken
        return taken


def select(score_q: list[float], score_k: list[float], problem: Problem) -> tuple[list[Entry], set[Entry]]:
    """The entries that are gathered, from the scores of tokens, and those of them whose rows are silent."""
    gathered, silent = list[Entry](), set[Entry]()
    p, top, half = problem.pooling, problem.levels - 1, problem.tile_budget // 2
    tiles = problem.budget // problem.tile_budget
    per_tile = problem.seq_length // tiles // problem.window
    for tile in range(tiles):
        by_query = {level: Share(half, half * p) for level in range(1, top)} | {top: Share(half, per_tile)}
        by_key = {level: Share(half, (2 * half) * p - half) for level in range(1, top)} | {top: Share(half, per_tile - half)}
        first_token = tile * per_tile * problem.window

        def enter(entry: Entry, seen_from: int | None, by_query=by_query, by_key=by_key, first_token=first_token) -> None:
            """What happens from an entry's first token to its last; its row is seen from `seen_from` on, where that is said."""
            level, i = entry
            gathered.append(entry)
            if seen_from not in (None, last_token(entry, problem)):
                silent.add(entry)
            if level == 0:
                return
            width = p**level
            before = score_q[(i - 1) * width : i * width] if i * width > first_token else [0.0]
            if seen_from is None and by_query[level].takes(max(before)):
                for c in range(p):
                    enter((level - 1, i * p + c), None)
            elif by_key[level].takes(max(score_k[i * width : (i + 1) * width])):
                for c in range(p):
                    enter((level - 1, i * p + c), last_token(entry, problem) if seen_from is None else seen_from)

        for i in range(tile * per_tile, (tile + 1) * per_tile):
            enter((top, i), None)
    return gathered, silent


def attention(q: Array, k: Array, v: Array, problem: Problem) -> tuple[Array, Array]:
    """Indices [B, G, S] into the concatenated pyramid, and output [N, B, H, D], by the norms."""
    out, ratio = np.zeros_like(q), problem.queries_per_group
    indices: list[list[list[int]]] = [[] for _ in range(problem.batch)]
    for b in range(problem.batch):
        for g in range(problem.groups):
            heads = slice(g * ratio, (g + 1) * ratio)
            entries, silent = select(norms(q[:, b, heads]), norms(k[:, b, g]), problem)
            entries = order(entries, problem)
            indices[b].append([number(entry, problem) for entry in entries])
            keys, values = pool(k[:, b, g], entries, problem), pool(v[:, b, g], entries, problem)
            loud = [i for i, entry in enumerate(entries) if entry not in silent]
            for h in range(heads.start, heads.stop):
                rows = attend(pool(q[:, b, h], entries, problem), keys, values, problem.dim**-0.5)
                out[:, b, h] = scatter(rows[loud], [entries[i] for i in loud], problem)
    return np.array(indices), out
