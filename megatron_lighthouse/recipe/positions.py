"""Loss by position: how much a model gains from what stands further back. Imports no Megatron. Ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy

type Array = numpy.ndarray[Any, Any]
GRIDS = ("log2", "equal")


def bucket_edges(length: int, grid: str = "log2", count: int = 16) -> list[int]:
    """Edges of the buckets: bucket i holds the positions edges[i] to edges[i+1] - 1 of a sequence of `length` tokens.

    Args:
        grid: 'log2' doubles them: 0, 1, 2, 4, … to `length`; 'equal' makes `count` of them, as equal as integers can be.

    Raises:
        ValueError: more equal buckets than positions.
    """
    if grid == "log2":
        return [0, *(1 << power for power in range(length.bit_length()) if 1 << power < length), length]
    if not 1 <= count <= length:
        raise ValueError(f"--loss-buckets {count} must be from 1 to --seq-length {length}.")
    return [length * i // count for i in range(count + 1)]


def bucket_means(losses: Array, edges: Sequence[int]) -> Array:
    """[s] losses of one sequence, in nats -> [buckets] their mean in each bucket, float64."""
    sums = numpy.add.reduceat(losses.astype(numpy.float64), edges[:-1])
    return sums / numpy.diff(edges)


def mean_and_error(values: Array) -> tuple[Array, Array]:
    """[n, …] independent values -> their mean and its standard error, both […]; of one value the error is NaN."""
    n = len(values)
    error = values.std(axis=0, ddof=1) / n**0.5 if n > 1 else numpy.full(values.shape[1:], numpy.nan)
    return values.mean(axis=0), error


def sequence_starts(tokens: int, length: int, most: int) -> list[int]:
    """Where sequences of `length` + 1 tokens start in a text: side by side, and if there are more than `most`, spread evenly.

    Neighbours share one token, the last that one predicts and the first that the next one reads, as in Megatron's datasets.

    Raises:
        ValueError: a text too short for one, or `most` below 1.
    """
    if most < 1:
        raise ValueError(f"--loss-sequences {most} must be at least 1, or 0 for no loss.")
    there = (tokens - 1) // length
    if there < 1:
        raise ValueError(f"--held-out has {tokens} tokens: give more than --seq-length {length}.")
    taken = min(most, there)
    return [length * (there * i // taken) for i in range(taken)]
