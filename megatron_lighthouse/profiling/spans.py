"""Spans of GPU work, whatever profiler saw them, and the arithmetic on them. Microseconds in, milliseconds out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from megatron_lighthouse.profiling.names import COMMUNICATION, DENSE, REST, Mark, is_attention, is_collective, kernel_mark
from megatron_lighthouse.profiling.threads import Thread, direction_of

Interval = tuple[float, float]


class Span(NamedTuple):
    """One kernel, copy or fill on a GPU; or, in a trace without GPUs, a piece of an operator's own time."""

    start: float
    end: float
    row: str
    direction: str
    is_kernel: bool = True
    """Whether it can hide communication: a copy or a fill does not."""


@dataclass
class Profile:
    """What one rank's GPU did."""

    name: str
    spans: list[Span]
    iterations: int | None
    """Of training; None where the trace does not say."""
    on_cpu: bool = False
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Times:
    """Milliseconds of a rank per iteration. The rows, less what ran at once, plus idle time make the wall."""

    rows: dict[tuple[str, str], float]
    """By row and direction: the sum of durations."""
    exposed: dict[str, float]
    """Of communication by direction, and of all of it as 'all': the time in which no other kernel ran."""
    at_once: float
    """Counted more than once in the rows, because several things ran at the same time."""
    idle: float
    wall: float
    """From the first work to the end of the last."""
    own_work: float
    """The time in which anything but communication ran."""


def is_time(start: object, end: object) -> bool:
    """Whether these are the start and the end of something: finite numbers, in this order."""
    return all(isinstance(x, int | float) and math.isfinite(x) for x in (start, end)) and bool(start <= end)  # type: ignore[operator]


def left_out(count: int) -> list[str]:
    """The note on pieces of GPU work that no profiler can have seen."""
    return [f"{count:,} pieces of GPU work have no time, or end before they begin: they are left out."] if count else []


def span_of(
    name: str, start: float, end: float, thread: Thread | None, at: float, is_kernel: bool = True, sends: bool = False
) -> Span:
    """A piece of GPU work that `thread` launched at the time `at`. Its own name says most, then the ranges open there.

    Args:
        sends: a copy that is communication: between GPUs, or within one on a stream that only copies. What our context
            parallelism leaves to the copy engines is such, though the driver calls it a copy within one GPU.
    """
    mark = thread.mark(at) if thread else None
    autograd = thread.autograd(at) if thread else None
    told = mark.direction if mark else None
    if sends or is_collective(name):
        return Span(start, end, COMMUNICATION, direction_of(told, autograd), is_kernel)
    ours = kernel_mark(name)
    if ours:
        mark = Mark(ours.row, ours.direction or told)
    elif mark is None:
        mark = Mark(DENSE if is_attention(name) else REST, None)
    return Span(start, end, mark.row, direction_of(mark.direction, autograd), is_kernel)


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points of time, as disjoint intervals in order."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def times_of(profile: Profile, iterations: int) -> Times:
    """The table of one rank; `profile` must hold work."""
    rows: dict[tuple[str, str], float] = {}
    for span in profile.spans:
        key = span.row, span.direction
        rows[key] = rows.get(key, 0.0) + span.end - span.start
    hiding = _of(s for s in profile.spans if s.row != COMMUNICATION and s.is_kernel)
    sent = [s for s in profile.spans if s.row == COMMUNICATION]
    exposed = {d: _beyond(hiding, _of(s for s in sent if s.direction == d)) for d in {s.direction for s in sent}}
    exposed["all"] = _beyond(hiding, _of(sent))
    busy = union(_of(profile.spans))
    wall, total = busy[-1][1] - busy[0][0], sum(rows.values())
    to_ms = 1e-3 / iterations
    return Times(
        {key: value * to_ms for key, value in rows.items()},
        {key: value * to_ms for key, value in exposed.items()},
        (total - length(busy)) * to_ms,
        (wall - length(busy)) * to_ms,
        wall * to_ms,
        length(union(_of(s for s in profile.spans if s.row != COMMUNICATION))) * to_ms,
    )


def _of(spans: Iterable[Span]) -> list[Interval]:
    return [(s.start, s.end) for s in spans]


def _beyond(hiding: Sequence[Interval], intervals: Sequence[Interval]) -> float:
    """How much of `intervals` lies outside of `hiding`."""
    return length(union([*hiding, *intervals])) - length(union(hiding))
