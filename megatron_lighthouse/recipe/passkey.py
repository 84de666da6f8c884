"""The one-digit passkey probe: one sentence in a long text names a digit, which the model must give at the end.

    …filler… \\nThe pass key is 7. Remember it.\\n …filler… \\nWhat is the pass key? The pass key is _

The next token is the answer. Only those of the ten digits are compared, so that guessing is right once in ten. Imports no
Megatron.
Ours, after the passkey retrieval of Mohtashami and Jaggi (arXiv 2305.16300).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy

type Array = numpy.ndarray[Any, Any]
KEY = b"\nThe pass key is %d. Remember it.\n"
QUESTION = b"\nWhat is the pass key? The pass key is "
CLASSIC = b"The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
FILLERS = ("noise", "classic")
"""'noise' is real text that the model has not seen, from another place in each sample; 'classic' is CLASSIC over and over."""
SHORTEST = 128
"""Tokens; the key and the question take 74."""
CHANCE = 0.1


@dataclass(frozen=True)
class Words:
    """The probe's sentences as tokens."""

    keys: Sequence[Array]
    """That name each digit."""
    key_at: int
    """Where a digit stands in them."""
    question: Array
    digits: Sequence[int]
    """The token of each digit after the question."""
    classic: Array
    """The classic sentences, once."""

    @property
    def shortest(self) -> int:
        return max(SHORTEST, 1 + max(map(len, self.keys)) + len(self.question))


def words_of(encode: Callable[[str], Array]) -> Words:
    """The sentences of a tokenizer, which may take a digit with the blank before it.

    Raises:
        ValueError: a tokenizer that does not give each digit after the question a token of its own.
    """
    keys = [encode((KEY % digit).decode()) for digit in range(10)]
    asked = [encode(QUESTION.decode() + str(digit)) for digit in range(10)]
    common, at = (_common(found) for found in (asked, keys))
    digits = [int(found[common]) for found in asked if len(found) == common + 1]
    if len({*digits}) < 10:
        raise ValueError(
            "--passkey-samples asks for the next token, and the tokenizer does not give each of the ten digits one of its own: "
            "use --passkey-samples 0."
        )
    return Words(keys, at, asked[0][:common], digits, encode(CLASSIC.decode()))


def _common(found: Sequence[Array]) -> int:
    """Tokens that all begin with."""
    shortest = min(map(len, found))
    same = [len({int(tokens[i]) for tokens in found}) == 1 for i in range(shortest)]
    return same.index(False) if False in same else shortest


BYTES = words_of(lambda words: numpy.frombuffer(words.encode(), dtype=numpy.uint8).astype(numpy.uint16))


@dataclass(frozen=True)
class Prompt:
    """What the model reads."""

    tokens: Array
    """[length]: uint16 where one is a byte, else int64."""
    answer: int
    key_at: int
    """The position of the digit."""


@dataclass(frozen=True)
class Sample:
    """One question of the grid."""

    filler: str
    length: int
    """Tokens, the question with them."""
    depth: float
    """Share of the filler that stands before the key: 0 puts it first, 1 right before the question."""
    number: int
    """Which of the cell's samples. Its last digit is the answer: so each answer is right equally often."""

    @property
    def digit(self) -> int:
        return self.number % 10


@dataclass(frozen=True)
class Grid:
    """All questions, in a fixed order. The same for every model."""

    lengths: Sequence[int]
    depths: Sequence[float]
    samples: int
    """A cell."""
    fillers: Sequence[str] = FILLERS
    seed: int = 1234
    words: Words = BYTES

    def cells(self) -> list[tuple[str, int, float]]:
        return list(product(self.fillers, self.lengths, self.depths))

    def questions(self) -> list[Sample]:
        return [Sample(*cell, number) for cell in self.cells() for number in range(self.samples)]

    def unbalanced(self) -> str | None:
        """What to say of samples that do not ask for each digit equally often; None where they do."""
        if self.samples % 10 == 0:
            return None
        return f"--passkey-samples {self.samples} does not ask for each digit equally often: use a multiple of ten."

    def check(self, text: int) -> None:
        """Refuse a grid that cannot be asked with `text` tokens of held-out text.

        Raises:
            ValueError: the argument, and what would work.
        """
        if self.samples < 1:
            raise ValueError(
                f"--passkey-samples {self.samples} must be at least 1; a multiple of ten asks for each digit equally."
            )
        for length in self.lengths:
            if length < self.words.shortest:
                raise ValueError(f"--passkey-lengths {length} must be at least {self.words.shortest}.")
            if length > text and "noise" in self.fillers:
                raise ValueError(f"--passkey-lengths {length} needs as much text in --held-out, which has {text} tokens.")
        for depth in self.depths:
            if not 0 <= depth <= 1:
                raise ValueError(f"--passkey-depths {depth:g} must be from 0 to 1.")


def prompt(sample: Sample, text: Array, seed: int, words: Words = BYTES) -> Prompt:
    """The question as tokens: the same for the same sample and seed.

    Args:
        text: tokens from which 'noise' is cut, at least as many as the sample is long.
    """
    key, question = words.keys[sample.digit], words.question
    room = sample.length - len(key) - len(question)
    before = round(sample.depth * room)
    generator = numpy.random.default_rng(
        [seed, FILLERS.index(sample.filler), sample.length, round(sample.depth * 1e6), sample.number]
    )
    if sample.filler == "noise":
        start = generator.integers(len(text) - room + 1)
        filler = text[start : start + room]
    else:
        start = generator.integers(len(words.classic))
        filler = numpy.resize(numpy.roll(words.classic, -start), room)
    tokens = numpy.concatenate([filler[:before], key, filler[before:], question])
    return Prompt(tokens, sample.digit, before + words.key_at)


def answer(
    sample: Sample, text: Array, seed: int, next_token: Callable[[Array], Array], words: Words = BYTES
) -> tuple[float, float]:
    """Ask one question.

    Args:
        next_token: [s] tokens -> [vocabulary] logits of the token after them.

    Returns:
        1 if the right digit has the greatest logit of the ten, else 0; and its log-probability among the ten, in nats.
    """
    asked = prompt(sample, text, seed, words)
    logits = next_token(asked.tokens)[[*words.digits]].astype(numpy.float64)
    logits = logits - logits.max()
    log_probabilities = logits - math.log(numpy.exp(logits).sum())
    return float(logits.argmax() == asked.answer), float(log_probabilities[asked.answer])


def by_cell(grid: Grid, answers: Array) -> list[dict[str, Any]]:
    """Accuracy and log-probability of each cell, with their standard errors over its samples.

    Args:
        answers: [questions, 2], as `answer` gives them, in the order of `Grid.questions`.
    """
    rows = []
    for (filler, length, depth), cell in zip(grid.cells(), answers.reshape(-1, grid.samples, 2), strict=True):
        rows.append({"filler": filler, "length": length, "depth": depth, **statistics(cell)})
    return rows


def by_question(grid: Grid, answers: Array) -> list[dict[str, Any]]:
    """Each question and how it was answered: with these, two models may be compared in pairs.

    Args:
        answers: as for `by_cell`.
    """
    return [
        {
            **{"filler": sample.filler, "length": sample.length, "depth": sample.depth, "sample": sample.number},
            **{"digit": sample.digit, "right": int(right), "log_probability": log_probability},
        }
        for sample, (right, log_probability) in zip(grid.questions(), answers.tolist(), strict=True)
    ]


def statistics(answers: Array) -> dict[str, Any]:
    """Of [n, 2] answers. The standard error of an accuracy p is sqrt(p (1 - p) / n): 0 where all or none are right."""
    n = len(answers)
    accuracy, log_probability = (float(x) for x in answers.mean(axis=0))
    spread = float(answers[:, 1].std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return {
        "samples": n,
        "accuracy": accuracy,
        "accuracy_standard_error": math.sqrt(accuracy * (1 - accuracy) / n),
        "log_probability": log_probability,
        "log_probability_standard_error": spread,
    }
