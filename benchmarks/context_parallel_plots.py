"""Picture of benchmarks/context_parallel.py: `python benchmarks/context_parallel_plots.py CSV PNG` draws it again."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

COLOURS = {"p2p": "#0b6e4f", "all_gather": "#3d5a80", "a2a": "#d1495b"}


def draw(path: Path, rows: list[dict[str, Any]], ranks: int) -> None:
    """Efficiency by scheme, and times beside dense attention."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    cases = list(dict.fromkeys(row["case"] for row in rows))
    for i, (scheme, colour) in enumerate(COLOURS.items()):
        found = {row["case"]: row for row in rows if row["what"] == f"lighthouse {scheme}"}
        x = [cases.index(case) + 0.25 * (i - 1) for case in found]
        left.bar(x, [100 * float(row["efficiency"]) for row in found.values()], 0.23, color=colour, label=scheme)
    left.axhline(100, color="black", linewidth=0.8)
    left.set(xticks=range(len(cases)), xticklabels=cases, ylabel=f"% of {ranks} times one GPU", title="Parallel efficiency")
    left.legend(frameon=False, loc="lower right")
    curves = {"lighthouse": "one GPU", "lighthouse p2p": f"{ranks} GPUs", "dense p2p": f"dense, {ranks} GPUs"}
    for what, label in curves.items():
        points = [(cases.index(row["case"]), float(row["fwd+bwd_ms"])) for row in rows if row["what"] == what]
        right.plot(*zip(*points, strict=True), "o-", label=label)
    right.set(xticks=range(len(cases)), xticklabels=cases, yscale="log", ylabel="ms, forward + backward", title="One layer")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    with Path(sys.argv[1]).open() as file:
        table = list(csv.DictReader(file))
    draw(Path(sys.argv[2]), table, max(int(row["ranks"]) for row in table))
