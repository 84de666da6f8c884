"""Hindsight: how much a model's loss gains from tokens later than the one it predicts. Imports no Megatron. Ours.

Lighthouse selects tile by tile, so which windows are refined depends on later tokens of the tile, and the loss of a position
with it. Here the tokens after a position are replaced by other text: what the model then knows of the label, it knows from
the tokens before. In a causal model nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy

from megatron_lighthouse.recipe.positions import mean_and_error
from megatron_lighthouse.recipe.refused import raise_all

type Array = numpy.ndarray[Any, Any]
FARTHEST = 256
"""Tokens: the greatest distance."""


@dataclass(frozen=True)
class Sample:
    """One held-out sequence of s tokens, and the position after which the future is another."""

    tokens: Array
    """[s + 1]: as they are, the last being a label alone."""
    position: int
    """From 0 to s - 1. Its label is the first token that is replaced where the model reads."""
    inputs: Array
    """[s]: the same to `position`, itself included; after it, other held-out text."""


def check(text: int, length: int, samples: int, seed: int) -> None:
    """Refuse what cannot be drawn from `text` tokens of held-out text.

    Raises:
        ValueError: each argument that is wrong, a line each, and what would work.
    """
    raise_all(problems(text, length, samples, seed))


def problems(text: int, length: int, samples: int, seed: int) -> Iterator[str]:
    """What `check` refuses."""
    if samples < 1:
        yield f"--hindsight-samples {samples} must be at least 1, or 0 for no hindsight."
    if seed < 0:
        yield f"--hindsight-seed {seed} must be at least 0, such as 1234."
    if text < 2 * length:
        yield (
            f"the held-out text has {text} tokens: --hindsight-samples needs at least {2 * length}, twice --seq-length "
            f"{length}, for what is replaced is replaced by text from elsewhere. Give more by --held-out, or "
            "--hindsight-samples 0."
        )


def draw(number: int, text: Array, length: int, seed: int) -> Sample:
    """Sample `number`, from 0: the same for every checkpoint. The position is uniform, the first and the last included.

    Args:
        text: [n] tokens of held-out text, at least 2 · `length`.
        length: s, tokens that the model reads.
    """
    generator = numpy.random.default_rng([seed, number])
    start = generator.integers(len(text) - length)
    position = int(generator.integers(length))
    replaced = length - 1 - position
    # a cut that shares no token with the sequence, of the text as a ring: what follows the sequence, then what precedes it
    cut = start + length + 1 + generator.integers(len(text) - length - replaced)
    other = numpy.take(text, numpy.arange(cut, cut + replaced), mode="wrap")
    tokens = text[start : start + length + 1]
    return Sample(tokens, position, numpy.concatenate([tokens[: position + 1], other]))


def distances(length: int) -> list[int]:
    """0, 1, 2, 4, 8, … tokens: as far as `FARTHEST`, and less than `length`."""
    return [d for d in (0, *(1 << power for power in range(FARTHEST.bit_length()))) if d < length]


def losses(sample: Sample, token_losses: Callable[[Array, Array], Array]) -> Array:
    """[2, distances] losses in nats, with the true future and with the other; NaN where the sequence has no such position.

    Column i is of the position that stands distances[i] before the sample's: so many true later tokens are left to it.

    Args:
        token_losses: [s + 1] tokens that hold the labels, [s] inputs -> [s] losses of the last s tokens.
    """
    both = numpy.stack([token_losses(sample.tokens, inputs) for inputs in (sample.tokens[:-1], sample.inputs)])
    at = sample.position - numpy.array(distances(len(sample.inputs)))
    return numpy.where(at >= 0, both.astype(numpy.float64)[:, at], numpy.nan)


def by_distance(positions: Array, length: int, found: Array) -> list[dict[str, Any]]:
    """A row a distance that some sample has: mean losses, their difference, and its standard error over samples, in nats.

    Args:
        positions: [n], of the samples in sequences of `length`.
        found: [n, 2, distances], as `losses` gives them.
    """
    rows = []
    for column, distance in enumerate(distances(length)):
        pairs = found[positions >= distance, :, column]
        if len(pairs):
            difference, error = mean_and_error(pairs[:, 1] - pairs[:, 0])
            true, other = pairs.mean(axis=0).tolist()
            row = {"distance": distance, "samples": len(pairs), "loss_true_future": true, "loss_other_future": other}
            rows.append({**row, "difference": float(difference), "standard_error": float(error)})
    return rows
