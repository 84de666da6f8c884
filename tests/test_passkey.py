"""The passkey probe: its questions, and models that know the answer or do not."""

from __future__ import annotations

import math
from argparse import Namespace
from dataclasses import replace
from typing import Any

import numpy
import pytest

from megatron_lighthouse.mcore.command_line.documents import FLAG
from megatron_lighthouse.recipe.passkey import KEY, PROBE, QUESTION, SHORTEST
from megatron_lighthouse.recipe.probe import CLASSIC, FILLERS, Grid, Sample, bytes_of, statistics

TEXT = (numpy.arange(5000) % 251 + numpy.arange(5000) // 251).astype(numpy.uint16) % 256
WORDS = PROBE.words(bytes_of)
GRID = Grid(PROBE, WORDS, lengths=[128, 1000], values=[0, 0.3, 1], samples=20, seed=1)


def text_of(tokens: Any) -> bytes:
    return bytes(tokens.astype(numpy.uint8))


@pytest.mark.parametrize("sample", GRID.questions()[::7], ids=str)
def test_the_key_is_where_it_says(sample: Any) -> None:
    asked = GRID.prompt(sample, TEXT)
    content = text_of(asked.tokens)
    assert len(asked.tokens) == sample.length
    assert asked.tokens.dtype == numpy.uint16
    assert content.endswith(QUESTION.encode())
    key = b"\nThe pass key is %d. Remember it.\n" % (sample.number % 10)
    assert [content.find(key), content.rfind(key)] == [*asked.places] * 2
    filler = content.removesuffix(QUESTION.encode())
    before, after = filler.split(key)
    assert len(before) == round(sample.at * len(before + after))
    whole = before + after
    assert whole in (text_of(TEXT) if sample.filler == "noise" else CLASSIC.encode() * 20)


def test_deterministic_and_fresh() -> None:
    questions = GRID.questions()
    prompts = [text_of(GRID.prompt(sample, TEXT).tokens) for sample in questions]
    assert prompts == [text_of(GRID.prompt(sample, TEXT).tokens) for sample in questions]
    noise = [text for text, sample in zip(prompts, questions, strict=True) if sample.filler == "noise"]
    assert len(set(noise)) == len(noise)
    other = replace(GRID, seed=2)
    assert prompts != [text_of(other.prompt(sample, TEXT).tokens) for sample in questions]


def test_filler_begins_anywhere() -> None:
    """Noise at every place of the text, the last too, and the classic sentences at other bytes than the first."""
    text = numpy.arange(200).astype(numpy.uint16)  # each token says where it stands
    room = SHORTEST - len(KEY.format(digit=0)) - len(QUESTION)

    def begins(filler: str, samples: int) -> set[int]:
        return {int(GRID.prompt(Sample(filler, SHORTEST, 1, number), text).tokens[0]) for number in range(samples)}

    assert begins("noise", 2000) == set(range(200 - room + 1))
    assert len(begins("classic", 50)) > 5


def reader(tokens: Any) -> Any:
    """A model that has read the key."""
    digit = text_of(tokens).split(b"The pass key is ")[1][:1]
    return numpy.where(numpy.arange(384) == ord(digit), 3.0, 0.0)


def ask(model: Any) -> Any:
    return numpy.array([GRID.answer(sample, TEXT, model) for sample in GRID.questions()])


def test_a_model_that_knows_is_always_right() -> None:
    answers = ask(reader)
    assert (answers[:, 0] == 1).all()
    expected = 3 - math.log(math.exp(3) + 9)  # the ten digits alone
    assert numpy.allclose(answers[:, 1], expected, atol=0, rtol=1e-12)
    assert statistics(answers)["accuracy_standard_error"] == 0


def test_a_model_that_knows_nothing_is_right_once_in_ten() -> None:
    answers = ask(lambda tokens: numpy.zeros(384))
    for row in GRID.by_cell(answers):
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

    rows = GRID.by_cell(ask(forgetful))
    assert [(row["filler"], row["length"], row["depth"]) for row in rows] == GRID.cells()
    assert {row["filler"] for row in rows} == set(FILLERS)
    for row in rows:
        assert row["accuracy"] == pytest.approx(1 if row["length"] == 128 or row["depth"] == 1 else 0.1), row


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"samples": 0}, "--passkey-samples 0 must be at least 1"),
        ({"lengths": [64]}, "--passkey-lengths 64 must be at least 128"),
        (
            {"lengths": [8000]},
            "held-out text has 5000 tokens: the passkey in 8000 .* more by --held-out, --passkey-lengths up to 5000",
        ),
        ({"values": [1.5]}, r"--passkey-depths 1\.5 must be from 0 to 1"),
    ],
)
def test_refused(change: dict[str, Any], error: str) -> None:
    grid = Grid(PROBE, WORDS, **{"lengths": [128], "values": [0], "samples": 1, **change})
    with pytest.raises(ValueError, match=error):
        grid.check(len(TEXT))


def test_over_documents_a_probes_text_is_one_of_them() -> None:
    """Its filler would else end it, between what is told and what is asked, wherever a cut of text crosses two files."""
    from megatron_lighthouse.recipe.probes import text_for

    tokens = numpy.array([1, 2, 256, 3, 4, 256], dtype=numpy.uint16)
    over = {FLAG.lstrip("-").replace("-", "_"): True}
    assert text_for(Namespace(**over), tokens, 256).tolist() == [1, 2, 3, 4]
    assert text_for(Namespace(**dict.fromkeys(over, False)), tokens, 256) is tokens
