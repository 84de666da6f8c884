"""What was open on a thread when it launched something: the step, and whether autograd was running."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import combinations, pairwise
from typing import NamedTuple

from megatron_lighthouse.profiling.names import BETWEEN, STEPS, Mark, engine_direction, range_mark

FOLLOWS = {*combinations(STEPS, 2), ("score", "score")}
"""Which steps of forward follow each other within one layer; some scorers score twice."""


class Range(NamedTuple):
    """A named range of one thread, in microseconds."""

    start: float
    end: float
    name: str


class Timeline[T]:
    """The innermost of nested ranges, at any time."""

    def __init__(self, ranges: Iterable[tuple[float, float, T]]) -> None:
        self.times: list[float] = []
        self.values: list[T | None] = []
        self.outermost: list[tuple[float, float, T]] = []
        stack: list[tuple[float, T]] = []

        def close(until: float) -> None:
            while stack and stack[-1][0] <= until:
                end, _ = stack.pop()
                self._change(end, stack[-1][1] if stack else None)

        for start, end, value in sorted(ranges, key=lambda r: (r[0], -r[1])):
            close(start)
            if stack:
                end = min(end, stack[-1][0])
            else:
                self.outermost.append((start, end, value))
            stack.append((end, value))
            self._change(start, value)
        close(float("inf"))

    def _change(self, time: float, value: T | None) -> None:
        self.times.append(time)
        self.values.append(value)

    def at(self, time: float) -> T | None:
        i = bisect_right(self.times, time) - 1
        return self.values[i] if i >= 0 else None


class Thread:
    """The ranges of one CPU thread that tell a step or autograd; or of one GPU stream, where a trace has no launches."""

    def __init__(self, ranges: Sequence[Range], is_stream: bool = False) -> None:
        marked = [(r.start, r.end, mark) for r in ranges if (mark := range_mark(r.name))]
        named = Timeline(marked)
        self.steps = Timeline([*marked, *_gaps(named.outermost)])
        engine = [(r.start, r.end, d) for r in ranges if (d := engine_direction(r.name))]
        self.engine = Timeline(engine)
        # without autograd's own ranges, the thread on which our backward ran is autograd's: it does nothing else
        self.is_engine = not is_stream and not engine and any(mark.direction == "backward" for _, _, mark in marked)

    def mark(self, time: float) -> Mark | None:
        return self.steps.at(time)

    def autograd(self, time: float) -> str | None:
        """'backward' or 'recompute' while autograd runs, None outside of it."""
        return "backward" if self.is_engine else self.engine.at(time)


def direction_of(told: str | None, autograd: str | None) -> str:
    """The direction of work whose name tells `told`: a step of forward that runs within autograd is recomputed."""
    if told == "forward" and autograd:
        return "recompute"
    return told or autograd or "forward"


def _gaps(ranges: Sequence[tuple[float, float, Mark]]) -> list[tuple[float, float, Mark]]:
    """What lies between two steps of one layer: in forward our own glue, in backward that of the inner attention.

    Backward runs scatter, attend, gather; the inner attention is other people's code, whose backward opens no range of ours.
    """
    found = []
    for (_, end, before), (start, _, after) in pairwise(ranges):
        if before.direction == after.direction == "forward":
            if (before.row, after.row) in FOLLOWS:
                found.append((end, start, Mark(BETWEEN, "forward")))
        elif before.direction == after.direction == "backward" and before.row != "gather" and after.row != "scatter":
            found.append((end, start, Mark("attend", "backward")))
    return [gap for gap in found if gap[0] < gap[1]]
