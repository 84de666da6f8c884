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


def in_documents(losses: Array, tokens: Array, end: int, edges: Sequence[int]) -> Array:
    """[s] losses of one row of documents -> [2, buckets]: their sum in each bucket of places in a document, and how many.

    The loss of a document's last token, whose label is of another document, counts nowhere.

    Args:
        tokens: [s], that the model read; a document ends with the token `end`.
    """
    ends = tokens == end
    begins = numpy.concatenate([[True], ends[:-1]])
    numbers = numpy.arange(len(tokens))
    places = numbers - numpy.maximum.accumulate(numpy.where(begins, numbers, 0))
    bucket, size = numpy.searchsorted(edges, places, side="right") - 1, len(edges) - 1
    counted = (losses.astype(numpy.float64), numpy.ones(len(losses)))
    return numpy.stack([numpy.bincount(bucket[~ends], x[~ends], size) for x in counted])


def ratio_and_error(sums: Array, counts: Array) -> tuple[Array, Array]:
    """[m, …] sums of values and how many, of m sequences -> the mean of all values and its standard error, both […].

    As `mean_and_error` of the values with the sequences as groups. NaN where there is no value.
    """
    with numpy.errstate(invalid="ignore"):
        mean, m = sums.sum(axis=0) / counts.sum(axis=0), len(sums)
        deviations = ((sums - mean * counts) ** 2).sum(axis=0)
        error = numpy.sqrt(m / (m - 1) * deviations) / counts.sum(axis=0) if m > 1 else numpy.full(mean.shape, numpy.nan)
    return mean, error


def mean_and_error(values: Array, groups: Sequence[int] | None = None) -> tuple[Array, Array]:
    """[n, …] values -> their mean and its standard error, both […].

    The error is s/√n of independent values. Given `groups`, [n] numbers, only values of different groups are independent: then
    it is sqrt(m / (m - 1) Σ (sum of a group's deviations from the mean)²) / n of m groups, the usual estimate for clusters;
    with groups of one size, s/√m of their means. NaN where there is one group, or one value.
    """
    mean, n = values.mean(axis=0), len(values)
    names, which = numpy.unique(range(n) if groups is None else groups, return_inverse=True)
    sums = numpy.zeros((len(names), *values.shape[1:]))
    numpy.add.at(sums, which, values - mean)
    m = len(names)
    error = numpy.sqrt(m / (m - 1) * (sums**2).sum(axis=0)) / n if m > 1 else numpy.full(mean.shape, numpy.nan)
    return mean, error


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
        raise ValueError(
            f"the held-out text has {tokens} tokens: the loss needs more than --seq-length {length}. Give more by --held-out, "
            "or --loss-sequences 0."
        )
    taken = min(most, there)
    return [length * (there * i // taken) for i in range(taken)]


def documents(starts: Sequence[int], length: int, ends: Array) -> list[int]:
    """The document, from 0, in which the middle of each sequence of `length` tokens stands.

    Args:
        starts: where the sequences start.
        ends: where the documents' last tokens stand, in order.
    """
    return [int(document) for document in numpy.searchsorted(ends, numpy.array(starts) + length // 2)]
