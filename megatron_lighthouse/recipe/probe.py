"""What retrieval probes share: sentences hidden in a long text, and a question at its end, of which a digit is the answer.

The next token is the answer. Only those of the ten digits are compared, so that guessing is right once in ten. Imports no
Megatron. Ours.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from typing import Any

import numpy

from megatron_lighthouse.recipe.refused import raise_all

type Array = numpy.ndarray[Any, Any]
type Encode = Callable[[str], Array]
"""A piece of text -> [n] tokens."""
CLASSIC = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
FILLERS = ("noise", "classic")
"""'noise' is real text that the model has not seen, from another place in each sample; 'classic' is CLASSIC over and over."""
CHANCE = 0.1


@dataclass(frozen=True)
class Axis:
    """What makes a cell of a probe, beside filler and length."""

    name: str
    """Of a column."""
    flag: str
    """After --PROBE-."""
    title: str
    form: str
    """Of a value, in pictures."""
    values: Sequence[float]
    """If nothing is said."""
    greatest: float
    """The least is 0."""
    kind: type[int] | type[float]
    help: str


@dataclass(frozen=True)
class Probe:
    """A kind of question."""

    name: str
    """Of its flags, --NAME-…, its tables and pictures, and its part of evaluation.json."""
    title: str
    axis: Axis
    words: Callable[[Encode], Words]
    """Its sentences, by a tokenizer."""
    samples: int
    """A cell, if nothing is said."""


@dataclass(frozen=True)
class Question:
    """A question as tokens, up to its answer."""

    tokens: Array
    digits: Sequence[int]
    """The token of each digit after them."""


@dataclass(frozen=True)
class Told:
    """What stands in a text."""

    sentences: Sequence[Array]
    shares: Sequence[float]
    """Of the filler that stands before each: 0 puts it first, 1 right before the question. None is less than the one before."""
    question: Question


class Words(ABC):
    """A probe's sentences as tokens."""

    def __init__(self, encode: Encode) -> None:
        self.classic = encode(CLASSIC)

    @abstractmethod
    def tell(self, sample: Sample, generator: numpy.random.Generator) -> Told:
        """What stands in the text of a sample."""

    @abstractmethod
    def shortest(self, at: float) -> int:
        """Tokens that a text needs, at values of the axis up to `at`."""


def question_of(encode: Encode, words: str, name: str) -> Question:
    """A question by a tokenizer, which may take a digit with the blank before it.

    Args:
        name: the probe's.

    Raises:
        ValueError: a tokenizer that does not give each digit after the question a token of its own.
    """
    asked = [encode(words + str(digit)) for digit in range(10)]
    same = [len({int(token) for token in tokens}) == 1 for tokens in zip(*asked, strict=False)]
    common = [*same, False].index(False)
    digits = [int(found[common]) for found in asked if len(found) == common + 1]
    if len({*digits}) < 10:
        raise ValueError(
            f"--{name}-samples asks for the next token, and the tokenizer does not give each of the ten digits one of its own: "
            f"use --{name}-samples 0."
        )
    return Question(asked[0][:common], digits)


def bytes_of(words: str) -> Array:
    """Text as the tokens of --text-data, uint16."""
    return numpy.frombuffer(words.encode(), dtype=numpy.uint8).astype(numpy.uint16)


@dataclass(frozen=True)
class Sample:
    """One question of the grid."""

    filler: str
    length: int
    """Tokens, the question with them."""
    at: float
    """A value of the probe's axis."""
    number: int
    """Which of the cell's samples. Its last digit is the answer: so each answer is right equally often."""

    @property
    def digit(self) -> int:
        return self.number % 10


@dataclass(frozen=True)
class Prompt:
    """What the model reads."""

    tokens: Array
    """[length]: uint16 where one is a byte, else int64."""
    places: Sequence[int]
    """Where each sentence begins."""
    digits: Sequence[int]
    """The token of each digit after the last."""


@dataclass(frozen=True)
class Grid:
    """All questions, in a fixed order. The same for every model."""

    probe: Probe
    words: Words
    lengths: Sequence[int]
    values: Sequence[float]
    """Of the probe's axis."""
    samples: int
    """A cell."""
    fillers: Sequence[str] = FILLERS
    seed: int = 1234

    def cells(self) -> list[tuple[str, int, float]]:
        return list(product(self.fillers, self.lengths, self.values))

    def questions(self) -> list[Sample]:
        return [Sample(*cell, number) for cell in self.cells() for number in range(self.samples)]

    def check(self, text: int) -> None:
        """Refuse a grid that cannot be asked with `text` tokens of held-out text.

        Raises:
            ValueError: each argument that is wrong, a line each, and what would work.
        """
        raise_all(self.problems(text))

    def problems(self, text: int) -> Iterator[str]:
        """What `check` refuses."""
        flag, axis = f"--{self.probe.name}", self.probe.axis
        if self.samples < 1:
            yield f"{flag}-samples {self.samples} must be at least 1; best a multiple of ten."
        for value in self.values:
            if not 0 <= value <= axis.greatest:
                yield f"{flag}-{axis.flag} {value:g} must be from 0 to {axis.greatest:g}."
        shortest = self.words.shortest(min(max(self.values), axis.greatest))
        for length in self.lengths:
            if length < shortest:
                yield f"{flag}-lengths {length} must be at least {shortest}."
        if (longest := max(self.lengths)) > text and "noise" in self.fillers:
            fits = f"{flag}-lengths up to {text}, " if text >= shortest else ""
            yield (
                f"the held-out text has {text} tokens: the {self.probe.title} in {longest} needs as many. Give more by "
                f"--held-out, {fits}{flag}-fillers classic or {flag}-samples 0."
            )

    def prompt(self, sample: Sample, text: Array) -> Prompt:
        """The question as tokens: the same for the same sample, seed and text.

        Args:
            text: tokens from which 'noise' is cut, at least as many as the sample is long.
        """
        generator = numpy.random.default_rng(
            [self.seed, FILLERS.index(sample.filler), sample.length, round(sample.at * 1e6), sample.number]
        )
        told = self.words.tell(sample, generator)
        lengths = [len(sentence) for sentence in told.sentences]
        room = sample.length - sum(lengths) - len(told.question.tokens)
        if sample.filler == "noise":
            start = generator.integers(len(text) - room + 1)
            filler = text[start : start + room]
        else:
            start = generator.integers(len(self.words.classic))
            filler = numpy.resize(numpy.roll(self.words.classic, -start), room)
        before = [round(share * room) for share in told.shares]
        first, *others = numpy.split(filler, before)
        parts = [part for pair in zip(told.sentences, others, strict=True) for part in pair]
        places = [here + earlier for here, earlier in zip(before, accumulate(lengths, initial=0), strict=False)]
        return Prompt(numpy.concatenate([first, *parts, told.question.tokens]), places, told.question.digits)

    def answer(self, sample: Sample, text: Array, next_token: Callable[[Array], Array]) -> tuple[float, float]:
        """Ask one question.

        Args:
            next_token: [s] tokens -> [vocabulary] logits of the token after them.

        Returns:
            1 if the right digit has the greatest logit of the ten, else 0; and its log-probability among the ten, in nats.
        """
        prompt = self.prompt(sample, text)
        logits = next_token(prompt.tokens)[[*prompt.digits]].astype(numpy.float64)
        logits = logits - logits.max()
        log_probabilities = logits - math.log(numpy.exp(logits).sum())
        return float(logits.argmax() == sample.digit), float(log_probabilities[sample.digit])

    def by_cell(self, answers: Array) -> list[dict[str, Any]]:
        """Accuracy and log-probability of each cell, with their standard errors over its samples.

        Args:
            answers: [questions, 2], as `answer` gives them, in the order of `questions`.
        """
        names = ("filler", "length", self.probe.axis.name)
        cells = zip(self.cells(), answers.reshape(-1, self.samples, 2), strict=True)
        return [{**dict(zip(names, cell, strict=True)), **statistics(found)} for cell, found in cells]

    def by_question(self, answers: Array) -> list[dict[str, Any]]:
        """Each question and how it was answered: with these, two models may be compared in pairs.

        Args:
            answers: as for `by_cell`.
        """
        return [
            {
                **{"filler": sample.filler, "length": sample.length, self.probe.axis.name: sample.at, "sample": sample.number},
                **{"digit": sample.digit, "right": int(right), "log_probability": log_probability},
            }
            for sample, (right, log_probability) in zip(self.questions(), answers.tolist(), strict=True)
        ]


def unbalanced(probe: Probe, samples: int) -> str | None:
    """What to say of samples that do not ask for each digit equally often; None where they do."""
    if samples % 10 == 0:
        return None
    return f"--{probe.name}-samples {samples} does not ask for each digit equally often: use a multiple of ten."


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
