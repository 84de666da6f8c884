"""Hindsight: its samples, and its statistics on losses made by hand and on models that look ahead or do not."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest

from megatron_lighthouse.recipe.hindsight import Sample, by_distance, check, distances, draw, losses

TEXT = numpy.arange(1000).astype(numpy.uint16)
"""Each token is its place in the text."""
SAMPLES = [draw(number, TEXT, 100, 1) for number in range(400)]


def test_only_what_follows_the_position_is_replaced() -> None:
    for sample in SAMPLES:
        after, sequence = sample.position + 1, sample.tokens.astype(int)
        assert (numpy.diff(sequence) == 1).all()
        assert (len(sequence), len(sample.inputs)) == (101, 100)
        assert (sample.inputs[:after] == sequence[:after]).all()
        other = sample.inputs[after:].astype(int)
        assert not set(other) & set(sequence), "the other future must be from elsewhere"
        assert set(numpy.diff(other) % 1000) <= {1}, "one cut; the text's beginning follows its end"


def test_the_tightest_text_that_is_let_through() -> None:
    check(200, 100, 1, 0)
    for number in range(400):
        sample = draw(number, TEXT[:200], 100, 1)
        assert not set(sample.inputs[sample.position + 1 :]) & set(sample.tokens)


def test_positions_are_uniform_and_sequences_anywhere() -> None:
    positions = numpy.array([sample.position for sample in SAMPLES])
    counts = numpy.histogram(positions, bins=4, range=(0, 100))[0]
    assert numpy.abs(counts - 100).max() < 40  # 4.6 standard deviations of 400 samples in four quarters
    assert {0, 99} <= {draw(number, TEXT, 100, 1).position for number in range(2000)}
    starts = numpy.array([sample.tokens[0] for sample in SAMPLES])
    assert starts.min() < 50
    assert starts.max() > 850  # of 899


def test_samples_depend_on_seed_and_number_alone() -> None:
    def shape(number: int, seed: int) -> tuple[Any, ...]:
        sample = draw(number, TEXT, 100, seed)
        return (*sample.tokens.tolist(), sample.position, *sample.inputs.tolist())

    drawn = [shape(number, 1) for number in range(20)]
    assert drawn == [shape(number, 1) for number in reversed(range(20))][::-1]
    assert len(set(drawn)) == 20
    assert not set(drawn) & {shape(number, 2) for number in range(20)}


def test_distances_double() -> None:
    assert distances(1) == [0]
    assert distances(9) == [0, 1, 2, 4, 8]
    assert distances(8) == [0, 1, 2, 4]
    assert distances(100_000) == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256]


def test_losses_stand_at_their_distances() -> None:
    sample = Sample(numpy.arange(10), 7, numpy.array([0, 1, 2, 3, 4, 5, 6, 7, 92]))

    def token_losses(tokens: Any, inputs: Any) -> Any:
        assert tokens is sample.tokens, "labels must be the true ones"
        return 10 * numpy.arange(9) + inputs.max()

    found = losses(sample, token_losses)
    assert found[:, :4].tolist() == [[78, 68, 58, 38], [162, 152, 142, 122]]  # positions 7, 6, 5, 3
    assert numpy.isnan(found[:, 4]).all()  # position -1


def test_differences_are_paired() -> None:
    found = numpy.array([[[1.0, 7.0], [2.0, 7.5]], [[5.0, math.nan], [8.0, math.nan]]])  # the second stands at position 0
    first, second = by_distance(numpy.array([1, 0]), 2, found)
    assert first == {
        **{"distance": 0, "samples": 2, "loss_true_future": 3, "loss_other_future": 5},
        **{"difference": 2, "standard_error": 1},  # of 1 and 3
    }
    assert second["samples"] == 1
    assert (second["loss_true_future"], second["loss_other_future"], second["difference"]) == (7, 7.5, 0.5)
    assert math.isnan(second["standard_error"])
    assert [row["distance"] for row in by_distance(numpy.array([0, 0]), 2, found)] == [0]


def test_a_model_that_looks_three_tokens_ahead() -> None:
    """Its loss is 0 where the third token after a position is the true one, and 1 elsewhere."""

    def token_losses(tokens: Any, inputs: Any) -> Any:
        right = inputs[3:] == tokens[3:-1]
        return numpy.concatenate([~right, [True] * 3]).astype(numpy.float32)

    found = numpy.array([losses(sample, token_losses) for sample in SAMPLES])
    rows = by_distance(numpy.array([sample.position for sample in SAMPLES]), 100, found)
    differences = {row["distance"]: row["difference"] for row in rows}
    can_look = numpy.mean([sample.position + 3 < 100 for sample in SAMPLES])
    assert differences[0] == pytest.approx(can_look)
    assert differences[2] > 0.9
    assert all(difference == 0 for distance, difference in differences.items() if distance > 3)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"samples": -1}, "--hindsight-samples -1 must be at least 1, or 0 for no hindsight"),
        ({"seed": -5}, "--hindsight-seed -5 must be at least 0"),
        ({"text": 199}, "the held-out text has 199 tokens: --hindsight-samples needs at least 200, twice --seq-length 100"),
    ],
)
def test_refused(change: dict[str, int], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        check(**{"text": 200, "length": 100, "samples": 1, "seed": 0, **change})
