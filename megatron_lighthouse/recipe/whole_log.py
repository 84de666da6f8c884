"""Whether the losses of a log can be judged by: finite, and without holes. Imports no Megatron. Ours."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

type Losses = dict[int, float]
"""Loss in nats by iteration, in order."""
NAMED = 3
"""Iterations and holes that an error names."""


def width_of(losses: Losses, switch: int, asked: int, warmup: int = 0) -> tuple[int, str]:
    """Losses in a mean: those asked for, or as many as the shorter stage has; and what to say of it.

    A log that lacks its beginning is no short stage, and neither is a warm-up, whose last iteration is `warmup`.
    """
    losses = {i: x for i, x in losses.items() if i > warmup}
    stages = [sum((i > switch) == later for i in losses) for later in (False, True)]
    fewest, every = min(stages), _interval([*losses])
    lacks = every is not None and min(losses) - warmup > every
    if asked <= fewest or not fewest or (lacks and fewest == stages[0]):
        return asked, ""
    stage = 1 + stages.index(fewest)
    return fewest, f" (not {asked}, as --smooth asks: stage {stage} logged {fewest} in all, too few to tell a spike from noise)"


def check_finite(losses: Losses) -> None:
    """Raises ValueError where a loss is NaN or infinite: no mean with it says anything."""
    if wrong := [i for i, loss in losses.items() if not math.isfinite(loss)]:
        named = _few(f"{losses[i]} at iteration {i}" for i in wrong)
        raise ValueError(f"not all losses are finite ({named}): nothing is judged. Train again from a checkpoint before that.")


def check_around(losses: Losses, switch: int, width: int, warmup: int = 0) -> None:
    """Raises ValueError where an iteration that should be logged is not: of the last `width` up to `switch`, and of all since.

    Stage 1 begins after `warmup`, of which there are no losses here.

    How often a run logs is the commonest distance of its iterations, in each stage: a second job may log more rarely.
    """
    every = _interval([*losses])
    if every is None:
        return
    before, after = ([i for i in losses if (i > switch) == later] for later in (False, True))
    early, late = (_interval(stage) if len(stage) > 2 else every for stage in (before, after))
    begin = before[-width:] if len(before) >= width else [warmup, *before]
    # a stage may end, and the next begin, between two iterations that are logged
    found = _holes([*begin, switch + 1], early or every) + _holes([switch, *after], late or every)
    if found:
        raise ValueError(
            f"the log has no loss of iterations {_few(found)}, just before the switch after {switch} or since: when the loss "
            f"was back cannot be told. Give a log without that hole, a smaller --smooth than {width}, or --switch ITER "
            "where the switch was elsewhere."
        )


def check_since(losses: Losses, switch: int) -> None:
    """As `check_around`, of a run that did not switch: what it lacks after that iteration."""
    since = [i for i in losses if i > switch]
    if found := _holes(since, _interval([*losses]) or 1):
        raise ValueError(f"the log has no loss of iterations {_few(found)}: give a log without that hole.")


def _interval(iterations: Sequence[int]) -> int | None:
    return statistics.mode(b - a for a, b in pairwise(iterations)) if len(iterations) > 1 else None


def _holes(iterations: Sequence[int], interval: int) -> list[str]:
    return [f"{a + 1} to {b - 1}" for a, b in pairwise(iterations) if b - a > interval]


def _few(names: Iterable[str]) -> str:
    every = list(names)
    return ", ".join([*every[:NAMED], *["…"] * (len(every) > NAMED)])


@contextmanager
def said_of(folder: Path) -> Iterator[None]:
    """Let errors name the run."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
