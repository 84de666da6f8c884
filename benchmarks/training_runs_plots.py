"""The picture of a table of training runs (benchmarks/training_runs.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPREAD = 20
"""Greatest over least, from which on a panel counts by powers of ten."""


@dataclass(frozen=True)
class Panel:
    """A column that is drawn."""

    column: str
    label: str
    predicted: str = ""
    """The column of what was predicted, drawn as a line."""


SECONDS = Panel("seconds a step", "seconds a step; |: predicted by the plan, of H200s", "predicted")


def draw(path: Path, rows: Sequence[dict[str, Any]], panels: Sequence[Panel]) -> None:
    """Bars of every run that was timed, a panel a column."""
    from matplotlib.figure import Figure

    timed = [row for row in rows if row["seconds a step"]]
    if not timed:
        return
    figure = Figure(figsize=(11, 1.2 + 0.3 * len(timed)), layout="constrained")
    places = range(len(timed))
    for axes, panel in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        found = [row.get(panel.column) or 0 for row in timed]
        axes.barh(places, found, color=[f"C{row['GPUs'] - 1}" for row in timed])
        foretold = {place: x for place, row in enumerate(timed) if (x := row.get(panel.predicted))}
        axes.plot(foretold.values(), foretold.keys(), "k|", markersize=14)
        axes.set(yticks=places, yticklabels=[row["run"] for row in timed], xlabel=panel.label)
        drawn = [x for x in (*found, *foretold.values()) if x]
        if drawn and max(drawn) > SPREAD * min(drawn):
            axes.set_xscale("log")
        axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()  # of all, which share it
    figure.savefig(path, dpi=120)
