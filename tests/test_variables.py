"""The variable-tracking probe: its texts by another reading of them, and models that follow names, or do not."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy
import pytest

from megatron_lighthouse.recipe.probe import FILLERS, Grid, bytes_of
from megatron_lighthouse.recipe.variables import CHAINS, PROBE
from tests.test_passkey import TEXT, text_of
from tests.variable_reader import assignments, question, read

WORDS = PROBE.words(bytes_of)
GRID = Grid(PROBE, WORDS, lengths=[300, 1000], values=[0, 1, 3], samples=20)
QUESTIONS = GRID.questions()
PROMPTS = [text_of(GRID.prompt(sample, TEXT).tokens).decode("latin-1") for sample in QUESTIONS]


@pytest.mark.parametrize(("sample", "said"), [*zip(QUESTIONS, PROMPTS, strict=True)][::7], ids=str)
def test_the_answer_is_what_the_assignments_come_to(sample: Any, said: str) -> None:
    asked = GRID.prompt(sample, TEXT)
    assert (len(said), asked.tokens.dtype) == (sample.length, numpy.uint16)
    assert read(f"{said}{sample.digit}") == (sample.digit, sample.at)
    assert asked.digits == [ord(str(digit)) for digit in range(10)]
    found = assignments(said)
    assert len({name for name, _ in found}) == len(found) == CHAINS * (sample.at + 1)
    ends = Counter(read(f"{said[: -len(question(said)[0])]}\nWhat is VAR {name}? VAR {name} = 0") for name, _ in found)
    assert {hops for _, hops in ends} == set(range(sample.at + 1))
    assert len({digit for digit, _ in ends}) == CHAINS  # each chain has a digit of its own
    assert [said.index(f"\nVAR {name} = ") for name, _ in found] == [*asked.places]
    rest = re.sub(r"\nVAR [A-Z] = (\d|VAR [A-Z])\n", "", said[: -len(question(said)[0])])
    assert sample.filler != "noise" or rest in text_of(TEXT).decode("latin-1")


def test_the_same_again_and_others_with_another_seed() -> None:
    assert [text_of(GRID.prompt(sample, TEXT).tokens).decode("latin-1") for sample in QUESTIONS] == PROMPTS
    assert len({*PROMPTS}) == len(PROMPTS)
    other = replace(GRID, seed=2)
    assert all(text_of(other.prompt(sample, TEXT).tokens).decode("latin-1") not in PROMPTS for sample in QUESTIONS)


def test_sentences_stand_everywhere_and_chains_take_turns() -> None:
    """The asked chain's first sentence is first of all once in CHAINS, and the middle of all places is the text's."""
    grid = Grid(PROBE, WORDS, [1000], [1], 400, ["noise"])
    first, places = 0, []
    for sample in grid.questions():
        asked = grid.prompt(sample, TEXT)
        found = assignments(text_of(asked.tokens).decode("latin-1"))
        first += found[0][1] == str(sample.digit)
        places += [*asked.places]
    assert abs(first / 400 - 1 / CHAINS) < 3 * (0.25 * 0.75 / 400) ** 0.5
    assert abs(numpy.mean(places) / 1000 - 0.45) < 0.03  # assignments and question take a tenth
    assert min(places) < 20
    assert max(places) > 950


def ask(model: Any) -> dict[float, float]:
    """The accuracy with each number of hops."""

    def next_token(tokens: Any) -> Any:
        logits = numpy.zeros(384)
        logits[ord("x")] = 9  # no digit: not compared
        for digit, logit in model(text_of(tokens).decode("latin-1")).items():
            logits[ord(str(digit))] = logit
        return logits

    rows = GRID.by_cell(numpy.array([GRID.answer(sample, TEXT, next_token) for sample in QUESTIONS]))
    assert [(row["filler"], row["length"], row["hops"]) for row in rows] == GRID.cells()
    assert {row["filler"] for row in rows} == {*FILLERS}
    return {at: float(numpy.mean([row["accuracy"] for row in rows if row["hops"] == at])) for at in GRID.values}


def test_who_follows_names_is_right_and_who_does_not_is_right_without_a_hop_alone() -> None:
    assert ask(lambda said: {read(f"{said}0")[0]: 3}) == {0: 1, 1: 1, 3: 1}

    def by_name(said: str) -> dict[str, float]:
        """Only what stands right after the name."""
        value = dict(assignments(said))[question(said)[1]]
        return {value: 3} if value.isdigit() else {}

    assert ask(by_name) == pytest.approx({0: 1, 1: 0.1, 3: 0.1})


@pytest.mark.parametrize("which", [0, -1])
def test_who_finds_digits_alone_is_right_once_in_chains(which: int) -> None:
    """Of the digits in the text the one that is named first, or last."""
    for accuracy in ask(lambda said: {[value for _, value in assignments(said) if value.isdigit()][which]: 3}).values():
        assert abs(accuracy - 1 / CHAINS) < 3 * (0.25 * 0.75 / 80) ** 0.5


def test_who_finds_nothing_is_right_once_in_ten() -> None:
    assert ask(lambda said: {}) == pytest.approx({0: 0.1, 1: 0.1, 3: 0.1})


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"samples": 0}, "--variables-samples 0 must be at least 1"),
        ({"lengths": [100]}, "--variables-lengths 100 must be at least 129"),
        ({"lengths": [8000]}, "the held-out text has 5000 tokens: the variable tracking in 8000 needs as many. Give more by"),
        ({"values": [6]}, "--variables-hops 6 must be from 0 to 5"),
    ],
)
def test_refused(change: dict[str, Any], error: str) -> None:
    grid = Grid(PROBE, WORDS, **{"lengths": [300], "values": [1], "samples": 1, **change})
    with pytest.raises(ValueError, match=error):
        grid.check(len(TEXT))


def test_the_shortest_text_has_all_sentences() -> None:
    for hops in range(6):
        length = WORDS.shortest(hops)
        grid = Grid(PROBE, WORDS, [length], [hops], 10)
        for sample in grid.questions():
            assert read(text_of(grid.prompt(sample, TEXT).tokens).decode("latin-1") + str(sample.digit)) == (sample.digit, hops)
