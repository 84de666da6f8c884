"""Axes of tokens and ranks: powers of two far apart, with labels that never run into each other. Ours."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

POINTS, LETTER, GAP = 280, 0.62, 5
"""Of an axis, at least, that a label may lie along; the width of a letter, in heights of it; between labels, in points."""
SMALL = 8
"""Height of a label's letters, in points."""


def tokens(count: int) -> str:
    """A length as people say it: 1M, 96K (of 1,024 each), or its digits."""
    for unit, letter in ((1 << 20, "M"), (1 << 10, "K")):
        if count and count % unit == 0:
            return f"{count // unit:,}{letter}"
    return f"{count:,}"


def along_log2(axes: Any, values: Iterable[int], say: Callable[[int], str] = tokens) -> None:
    """Make x logarithmic, with a tick at each of `values`, above 0. As many have a label as fit: the ends, then powers of 2."""
    known = sorted(set(values))
    axes.set_xscale("log", base=2)
    _label(axes, known, [math.log2(x) for x in known], say)


def from_zero(axes: Any, values: Iterable[int]) -> None:
    """The same of values that begin at 0, which stands as far before 1 as 1 before 2."""
    known = sorted(set(values))
    axes.set_xscale("symlog", base=2, linthresh=1)
    _label(axes, known, [math.log2(x) if x else -1.0 for x in known], tokens)


def _label(axes: Any, values: list[int], places: list[float], say: Callable[[int], str]) -> None:
    span = (places[-1] - places[0]) / POINTS or 1.0  # of the axis, in a point
    half = {x: (len(say(x)) * LETTER * SMALL + GAP) * span / 2 for x in values}
    at = dict(zip(values, places, strict=True))
    shown: list[int] = []
    for x in sorted(values, key=lambda x: (x not in (values[0], values[-1]), x & (x - 1) != 0, -x)):
        if all(abs(at[x] - at[other]) >= half[x] + half[other] for other in shown):
            shown.append(x)
    axes.set_xticks(values, [say(x) if x in shown else "" for x in values], fontsize=SMALL)
    axes.minorticks_off()
