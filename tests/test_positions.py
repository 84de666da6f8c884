"""Loss by position, on losses made by hand."""

from __future__ import annotations

import numpy
import pytest

from megatron_lighthouse.recipe.positions import (
    bucket_edges,
    bucket_means,
    documents,
    in_documents,
    mean_and_error,
    ratio_and_error,
    sequence_starts,
)


@pytest.mark.parametrize(
    ("length", "edges"), [(1, [0, 1]), (8, [0, 1, 2, 4, 8]), (9, [0, 1, 2, 4, 8, 9]), (12, [0, 1, 2, 4, 8, 12])]
)
def test_edges_double(length: int, edges: list[int]) -> None:
    assert bucket_edges(length) == edges


def test_edges_are_equal() -> None:
    assert bucket_edges(16, "equal", 4) == [0, 4, 8, 12, 16]
    assert bucket_edges(10, "equal", 4) == [0, 2, 5, 7, 10]
    with pytest.raises(ValueError, match="--loss-buckets 11 must be from 1 to --seq-length 10"):
        bucket_edges(10, "equal", 11)


def test_each_loss_is_in_one_bucket() -> None:
    losses = numpy.array([9, 5, 1, 3, 2, 2, 4, 4], dtype=numpy.float32)
    means = bucket_means(losses, [0, 1, 2, 4, 8])
    assert means.tolist() == [9, 5, 2, 3]
    assert means.dtype == numpy.float64


def test_mean_and_error_over_sequences() -> None:
    mean, error = mean_and_error(numpy.array([[1.0, 4.0], [3.0, 4.0]]))
    assert mean.tolist() == [2, 4]
    assert error.tolist() == [1, 0]  # sqrt(2) / sqrt(2): the two values of the first lie 1 from their mean
    mean, error = mean_and_error(numpy.array([[1.0, 4.0]]))
    assert mean.tolist() == [1, 4]
    assert numpy.isnan(error).all()


def test_places_are_counted_in_each_document() -> None:
    end, tokens = 9, numpy.array([1, 2, 3, 9, 9, 4, 5, 9, 6, 7, 8, 1, 2])
    losses, edges = numpy.arange(13, dtype=numpy.float32), [0, 1, 2, 4, 8, 13]
    sums, counts = in_documents(losses, tokens, end, edges)
    assert counts.tolist() == [3, 3, 3, 1, 0]  # not those of ends, whose labels are of another document
    assert sums.tolist() == [0 + 5 + 8, 1 + 6 + 9, 2 + 10 + 11, 12, 0]


def test_mean_and_error_of_sequences_that_count_unequally() -> None:
    values = numpy.array([1.0, 4.0, 2.0, 8.0, 5.0])
    groups = [0, 0, 1, 1, 1]
    sums, counts = numpy.array([[5.0, 0], [15.0, 0]]), numpy.array([[2.0, 0], [3.0, 0]])
    mean, error = ratio_and_error(sums, counts)
    expected_mean, expected_error = mean_and_error(values, groups)
    assert (mean[0], error[0]) == (expected_mean, expected_error)
    assert numpy.isnan([mean[1], error[1]]).all()
    assert numpy.isnan(ratio_and_error(sums[:1], counts[:1])[1]).all()


def test_sequences_share_their_ends_and_are_spread_evenly() -> None:
    assert sequence_starts(1025, 256, 64) == [0, 256, 512, 768]
    assert sequence_starts(1024, 256, 64) == [0, 256, 512]
    assert sequence_starts(10_000, 256, 3) == [0, 256 * 13, 256 * 26]  # of 39
    with pytest.raises(ValueError, match="the held-out text has 256 tokens: the loss needs more than --seq-length 256"):
        sequence_starts(256, 256, 1)
    with pytest.raises(ValueError, match="--loss-sequences -1 must be at least 1"):
        sequence_starts(1000, 256, -1)


def test_documents_by_the_middle_of_a_sequence() -> None:
    # documents end with tokens 5, 9 and 30; middles stand at 2, 6, 10 and 26
    assert documents([0, 4, 8, 24], 4, numpy.array([5, 9, 30])) == [0, 1, 2, 2]
