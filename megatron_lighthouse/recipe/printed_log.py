"""What Megatron prints of each iteration: its loss and its seconds, and what the seconds of a stage come to. Ours."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from typing import Any

type Row = dict[str, Any]
LINE = re.compile(r"iteration +(\d+)/ *\d+ \|.*? elapsed time per iteration \(ms\): ([^ ]+) \|.*? lm loss: ([^ ]+) \|")
"""An iteration in Megatron's log."""


def curve(log: str, start: str) -> list[Row]:
    """The iterations in a log of Megatron, as rows of `iteration`, `loss` (nats) and `seconds`.

    Where a run was started again, its later iterations count. What Megatron logs of a process's second iteration is the mean
    over the first two, so it is taken apart here.

    Args:
        log: all that the processes of a run printed, one after the other.
        start: a line that stands before what each of them printed.
    """
    rows: dict[int, Row] = {}
    for part in log.split(start):
        found = [(int(i), float(loss), float(ms) / 1000) for i, ms, loss in LINE.findall(part)]
        if len(found) > 1:
            (_, first_loss, first_seconds), (second, loss, seconds) = found[:2]
            found[1] = (second, 2 * loss - first_loss, 2 * seconds - first_seconds)
        if found:
            rows = {i: row for i, row in rows.items() if i < found[0][0]}
        rows |= {i: {"iteration": i, "loss": round(loss, 6), "seconds": round(seconds, 4)} for i, loss, seconds in found}
    return list(rows.values())


def stages(points: Sequence[Row], switch: int, dense_from: int, warmup: int = 0) -> dict[str, list[float]]:
    """The seconds of the iterations of each stage, in their order.

    Args:
        points: rows of `curve`.
        switch: the last iteration with Lighthouse in all its layers.
        dense_from: the first after it in which all layers are dense.
        warmup: the last of a dense warm-up; 0 without one.
    """
    found: dict[str, list[float]] = {"warmup": [], "lighthouse": [], "return": [], "dense": []}
    for point in points:
        i = point["iteration"]
        stage = "warmup" if i <= warmup else "lighthouse" if i <= switch else "return" if i < dense_from else "dense"
        found[stage].append(point["seconds"])
    return found


def median(times: Sequence[float]) -> float | None:
    """Of the second half: in the first, iterations compile, and the evaluation of the run before may use the GPU."""
    return statistics.median(times[len(times) // 2 :]) if times else None


def steady(points: Sequence[Row], switch: int, dense_from: int, warmup: int = 0) -> list[float]:
    """[iterations] the seconds of each iteration, replaced by the `median` of its stage."""
    found = stages(points, switch, dense_from, warmup).values()
    return [seconds for times in found for seconds in [median(times) or 0.0] * len(times)]
