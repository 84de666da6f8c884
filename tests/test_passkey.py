"""The passkey probe: its questions, and models that know the answer or do not."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest

from megatron_lighthouse.recipe.passkey import (
    CLASSIC,
    FILLERS,
    KEY,
    QUESTION,
    SHORTEST,
    Grid,
    Sample,
    answer,
    by_cell,
    prompt,
    statistics,
)

TEXT = (numpy.arange(5000) % 251 + numpy.arange(5000) // 251).astype(numpy.uint16) % 256
GRID = Grid(lengths=[128, 1000], depths=[0, 0.3, 1], samples=20)


def text_of(tokens: Any) -> bytes:
    return bytes(tokens.astype(numpy.uint8))


@pytest.mark.parametrize("sample", GRID.questions()[::7], ids=str)
def test_the_key_is_where_it_says(sample: Any) -> None:
    asked = prompt(sample, TEXT, 1)
    content = text_of(asked.tokens)
    assert len(asked.tokens) == sample.length
    assert asked.tokens.dtype == numpy.uint16
    assert content.endswith(QUESTION)
    assert content[asked.key_at : asked.key_at + 1] == b"%d" % asked.answer
    assert asked.answer == sample.number % 10
    key = b"\nThe pass key is %d. Remember it.\n" % asked.answer
    assert content.count(key) == 1
    filler = content.removesuffix(QUESTION)
    before, after = filler.split(key)
    assert len(before) == round(sample.depth * len(before + after))
    whole = before + after
    assert whole in (text_of(TEXT) if sample.filler == "noise" else CLASSIC * 20)


def test_deterministic_and_fresh() -> None:
    questions = GRID.questions()
    prompts = [text_of(prompt(sample, TEXT, 1).tokens) for sample in questions]
    assert prompts == [text_of(prompt(sample, TEXT, 1).tokens) for sample in questions]
    noise = [text for text, sample in zip(prompts, questions, strict=True) if sample.filler == "noise"]
    assert len(set(noise)) == len(noise)
    assert prompts != [text_of(prompt(sample, TEXT, 2).tokens) for sample in questions]


def test_filler_begins_anywhere() -> None:
    """Noise at every place of the text, the last too, and the classic sentences at other bytes than the first."""
    text = numpy.arange(200).astype(numpy.uint16)  # each token says where it stands
    room = SHORTEST - len(KEY % 0) - len(QUESTION)

    def begins(filler: str, samples: int) -> set[int]:
        return {int(prompt(Sample(filler, SHORTEST, 1, number), text, 1).tokens[0]) for number in range(samples)}

    assert begins("noise", 2000) == set(range(200 - room + 1))
    assert len(begins("classic", 50)) > 5


def reader(tokens: Any) -> Any:
    """A model that has read the key."""
    digit = text_of(tokens).split(b"The pass key is ")[1][:1]
    return numpy.where(numpy.arange(384) == ord(digit), 3.0, 0.0)


def ask(model: Any) -> Any:
    return numpy.array([answer(sample, TEXT, GRID.seed, model) for sample in GRID.questions()])


def test_a_model_that_knows_is_always_right() -> None:
    answers = ask(reader)
    assert (answers[:, 0] == 1).all()
    expected = 3 - math.log(math.exp(3) + 9)  # the ten digits alone
    assert numpy.allclose(answers[:, 1], expected, atol=0, rtol=1e-12)
    assert statistics(answers)["accuracy_standard_error"] == 0


def test_a_model_that_knows_nothing_is_right_once_in_ten() -> None:
    answers = ask(lambda tokens: numpy.zeros(384))
    for row in by_cell(GRID, answers):
        assert row["accuracy"] == pytest.approx(0.1)
        assert row["accuracy_standard_error"] == pytest.approx(math.sqrt(0.1 * 0.9 / 20))
        assert row["log_probability"] == pytest.approx(-math.log(10))


def test_only_digits_are_compared() -> None:
    def prefers_letters(tokens: Any) -> Any:
        logits = reader(tokens)
        logits[ord("a")] = 100
        return logits

    assert (ask(prefers_letters) == ask(reader)).all()


def test_cells_are_in_order() -> None:
    """A model that has read only the last 500 tokens: right in short texts, and in long ones where the key stands last."""

    def forgetful(tokens: Any) -> Any:
        return reader(tokens) if b". Remember it." in text_of(tokens[-500:]) else numpy.zeros(384)

    rows = by_cell(GRID, ask(forgetful))
    assert [(row["filler"], row["length"], row["depth"]) for row in rows] == GRID.cells()
    assert {row["filler"] for row in rows} == set(FILLERS)
    for row in rows:
        assert row["accuracy"] == pytest.approx(1 if row["length"] == 128 or row["depth"] == 1 else 0.1), row


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"samples": 0}, "--passkey-samples 0 must be at least 1"),
        ({"lengths": [64]}, "--passkey-lengths 64 must be at least 128"),
        ({"lengths": [8000]}, "--passkey-lengths 8000 needs as much text in --held-out, which has 5000"),
        ({"depths": [1.5]}, r"--passkey-depths 1\.5 must be from 0 to 1"),
    ],
)
def test_refused(change: dict[str, Any], error: str) -> None:
    grid = Grid(**{"lengths": [128], "depths": [0], "samples": 1, **change})
    with pytest.raises(ValueError, match=error):
        grid.check(len(TEXT))
