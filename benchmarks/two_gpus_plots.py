"""The picture of benchmarks/two_gpus.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Seconds a step of each run, with what the plan predicts, and how efficient two GPUs are."""
    from matplotlib.figure import Figure

    timed = [row for row in rows if row["seconds a step"]]
    if not timed:
        return
    figure = Figure(figsize=(11, 1.2 + 0.3 * len(timed)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places, names = range(len(timed)), [row["run"] for row in timed]
    left.barh(places, [row["seconds a step"] for row in timed], color=[f"C{row['GPUs'] - 1}" for row in timed])
    for place, row in enumerate(timed):
        if row["predicted"]:
            left.plot(row["predicted"], place, "k|", markersize=14)
        if row["efficiency"]:
            right.plot(100 * row["efficiency"], place, "C1o")
    left.set(yticks=places, yticklabels=names, xlabel="seconds a step; |: predicted by the plan, of H200s")
    left.invert_yaxis()
    right.axvline(100, color="black", linewidth=0.8)
    right.set(xlabel="% of twice one GPU's speed", xlim=(0, None))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
