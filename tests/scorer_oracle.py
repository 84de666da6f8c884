"""What each scorer scores, written down plainly in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module

import numpy as np
import torch

from megatron_lighthouse.lighthouse.geometry import Tiled
from tests.oracle import Array, Problem, attend, norms

# the package has the function under the module's name
linear = import_module("megatron_lighthouse.lighthouse.scorers.linear")

Pair = tuple[Array, Array]
"""s^Q and s^K of each row."""


def both_ways(rows_of: Callable[[Array, Array, Array], Array], q: Array, k: Array, v: Array) -> Pair:
    """Rows over rows, then the other way round: q [n, R, D], k and v [n, D]."""
    by_query = np.stack([rows_of(q[:, r], k, v) for r in range(q.shape[1])], 1)
    return np.array(norms(by_query)), np.array(norms(rows_of(k, q.mean(1), v)))


def softmax_rows(scale: float | None) -> Callable[[Array, Array, Array], Array]:
    return lambda q, k, v: attend(q, k, v, scale_of(q, scale))


def scale_of(q: Array, scale: float | None) -> float:
    return 1 / math.sqrt(q.shape[-1]) if scale is None else scale


def streams(score: Callable[[Array, Array, Array], Pair], q: Array, k: Array, v: Array) -> Pair:
    """Every fourth token by itself."""
    out = np.zeros(len(q)), np.zeros(len(q))
    for c in range(4):
        for whole, part in zip(out, score(q[c::4], k[c::4], v[c::4]), strict=True):
            whole[c::4] = part
    return out


def dilated_oracle(q: Array, k: Array, v: Array, scale: float | None = None) -> Pair:
    return streams(lambda *x: both_ways(softmax_rows(scale), *x), q, k, v)


def gla_oracle(q: Array, k: Array, v: Array) -> Pair:
    weight = linear._weight(q.shape[-1], torch.device("cpu")).numpy()

    def stream(q: Array, k: Array, v: Array) -> Pair:
        gates = [-math.log1p(math.exp(-float(x @ weight))) / 16 for x in q.mean(1)]

        def recurrence(q: Array, k: Array, v: Array) -> Array:
            state, rows = np.zeros((q.shape[1], q.shape[1])), []
            for t in range(len(q)):
                state = math.exp(gates[t]) * state + np.outer(k[t], v[t])
                rows.append(q[t] @ state / math.sqrt(q.shape[1]))
            return np.array(rows)

        return both_ways(recurrence, q, k, v)

    return streams(stream, q, k, v)


def norm_oracle(q: Array, k: Array, v: Array) -> Pair:
    return np.array(norms(q)), np.array(norms(k))


def finer_oracle(q: Array, k: Array, window: int) -> Pair:
    """Of one tile: how far a group's queries lie from their window's mean; the key with the mean query, made positive."""
    apart = q - q.reshape(-1, window, *q.shape[1:]).mean(1).repeat(window, 0)
    return (apart**2).sum((1, 2)), np.array([1 + x if x >= 0 else 1 / (1 - x) for x in k @ q.mean((0, 1))])


def mass_oracle(q: Array, k: Array, tile: int, scale: float | None = None) -> Pair:
    """Of pooled rows: the greatest weight of each, over the windows before it; and the weight from the rest of its tile."""
    by_query, by_key = np.zeros(len(k)), np.zeros(len(k))
    for a in range(1, len(k)):
        for r in range(q.shape[1]):
            weights = np.exp(k[:a] @ q[a, r] * scale_of(q, scale))
            weights /= weights.sum()
            by_query[a] += weights.max()
            by_key[a // tile * tile : a] += weights[a // tile * tile :]
    return by_query, by_key


def windows(scores: Array, problem: Problem) -> list[Array]:
    """The maxima of level-0 scores, level by level."""
    return [scores.reshape(-1, problem.pooling**level).max(1) for level in range(1, problem.levels)]


ORACLES = {"norm": norm_oracle, "summary": norm_oracle, "dilated": dilated_oracle, "gla": gla_oracle, "mass": norm_oracle}
"""Of each scorer: [N, R, D], [N, D], [N, D] -> s^Q and s^K of every token, [N] each. (Of `mass`: see `oracle`.)"""


def oracle(scorer: str, q: Array, k: Array, v: Array, problem: Problem, scale: float | None = None) -> Array:
    """[2, B, G, coarse length], of q [N, B, H, D], k and v [N, B, G, D], where the softmax has this scale."""
    token, ratio = ORACLES[scorer], problem.queries_per_group
    out = np.zeros((2, problem.batch, problem.groups, pyramid_of(problem).coarse_length))
    for b in range(problem.batch):
        for g in range(problem.groups):
            inputs = q[:, b, g * ratio : (g + 1) * ratio], k[:, b, g], v[:, b, g]
            pooled = [x.reshape(-1, problem.window, *x.shape[1:]).mean(1) for x in inputs]
            tops: Pair | tuple[()] = ()
            scores = dilated_oracle(*inputs, scale) if scorer == "dilated" else token(*inputs)
            if scorer == "summary":
                tops = both_ways(softmax_rows(scale), *pooled)
            elif scorer == "mass":
                tile = pyramid_of(problem).tile
                tops = mass_oracle(*pooled[:2], tile, scale)
                firsts = range(0, len(q), tile * problem.window)
                tiles = [[x[i : i + tile * problem.window] for x in inputs[:2]] for i in firsts]
                by_query, by_key = zip(*(finer_oracle(*x, problem.window) for x in tiles), strict=True)
                scores = np.concatenate(by_query), np.concatenate(by_key)
            levels = [windows(x, problem) for x in scores]
            for level, top in zip(levels, tops, strict=False):
                level[-1] = top
            out[:, b, g] = [np.concatenate(level) for level in levels]
    return out


def pyramid_of(problem: Problem) -> Tiled:
    tiles = problem.budget // problem.tile_budget
    return Tiled(problem.seq_length, problem.levels, problem.pooling, problem.seq_length // problem.window // tiles)
