"""Pictures of benchmarks/attention.py, from the rows of its table; `python benchmarks/attention_plots.py CSV…` draws again."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attention_cases import LENGTHS, OTHERS
from together import check_one_device, medians

from megatron_lighthouse.ticks import along_log2

Row = dict[str, Any]
COLOURS = {"lighthouse": "#0b6e4f", "authors": "#d1495b", "dense cudnn": "#3d5a80", "inner": "#9aa5b1"}
STEPS = {"score": "#f4d35e", "select": "#ee964b", "gather": "#0b6e4f", "scatter": "#3d5a80"}
DETAILED = ("N=98304 L=3 p=4 k=1536", "N=524288 L=3 p=4 k=4096")
"""Cases whose steps are drawn."""


def draw(out: Path, rows: Sequence[Row]) -> None:
    """times.png (time against sequence length) and steps.png (each step beside its memory floor)."""
    if any(_plain(r) for r in rows):
        _times(out / "times.png", rows)
    if any(r["case"] in DETAILED for r in rows):
        _steps(out / "steps.png", rows)


def read(files: Sequence[Path]) -> list[Row]:
    """The rows of some CSV files, numbers as numbers."""
    rows: list[Row] = []
    for file in files:
        with file.open() as lines:
            for row in csv.DictReader(lines):
                rows.append({key: float(x) if key in ("N", "ms", "floor_ms") and x else x or None for key, x in row.items()})
    return rows


def _plain(row: Row) -> bool:
    return row["ms"] is not None and "B=" not in row["case"] and row["case"] in _by_length()


def _by_length() -> set[str]:
    return {case.name for case in [*LENGTHS, OTHERS[-1]]}


def _times(path: Path, rows: Sequence[Row]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    for axes, direction, title in zip(
        figure.subplots(1, 2), ("fwd", "fwd+bwd"), ("forward", "forward + backward"), strict=True
    ):
        for what, colour in COLOURS.items():
            points = medians((r["N"], r["ms"]) for r in rows if _plain(r) and (r["what"], r["direction"]) == (what, direction))
            if points:
                axes.plot(*zip(*points, strict=True), "o-", color=colour, label=what, markersize=4)
        axes.set(yscale="log", xlabel="tokens", ylabel="milliseconds", title=title)
        along_log2(axes, {int(r["N"]) for r in rows if _plain(r)})
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, loc="outside right center")
    figure.savefig(path, dpi=120)


def _steps(path: Path, rows: Sequence[Row]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    cases = [name for name in DETAILED if any(r["case"] == name for r in rows)]
    for axes, case in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases, strict=True):
        for x, direction in enumerate(("fwd", "bwd")):
            bottom = 0.0
            for step, colour in STEPS.items():
                found = [r for r in rows if (r["case"], r["what"], r["direction"]) == (case, step, direction)]
                for row in found:
                    axes.bar(x, row["ms"], 0.5, bottom=bottom, color=colour, label=step if direction == "fwd" else None)
                    bottom += row["ms"]
            floor = sum(r["floor_ms"] for r in rows if r["case"] == case and r["what"] in STEPS and r["direction"] == direction)
            axes.hlines(floor, x - 0.35, x + 0.35, color="black", label="memory floor" if direction == "fwd" else None)
        axes.set(xticks=[0, 1], xticklabels=["forward", "backward"], ylabel="milliseconds", title=case)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, loc="outside right center")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    files = [Path(name) for name in sys.argv[1:]]
    check_one_device(files)
    draw(files[0].parent, read(files))
