"""Pictures of benchmarks/context_parallel.py.

`python benchmarks/context_parallel_plots.py CSV PNG` draws that of one run again; with several CSVs before the PNG, of runs on
2, 4 and 8 ranks, how the layer scales with ranks.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from together import check_one_device

COLOURS = {"p2p": "#0b6e4f", "all_gather": "#3d5a80", "a2a": "#d1495b"}
DIAGONAL = {1: "128K", 2: "256K", 4: "512K", 8: "1M-L3"}
"""The case of 131,072 tokens a rank, k = N/128, by ranks: weak scaling."""


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
    left.legend(ncols=len(COLOURS), fontsize=8, loc="lower right")
    curves = {"lighthouse": "one GPU", "lighthouse p2p": f"{ranks} GPUs", "dense p2p": f"dense, {ranks} GPUs"}
    for what, label in curves.items():
        points = [(cases.index(row["case"]), float(row["fwd+bwd_ms"])) for row in rows if row["what"] == what]
        if points:
            right.plot(*zip(*points, strict=True), "o-", label=label)
    right.set(xticks=range(len(cases)), xticklabels=cases, yscale="log", ylabel="ms, forward + backward", title="One layer")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def draw_ranks(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Efficiency over one GPU against ranks: of each length by p2p (strong scaling), and of 131,072 tokens a rank (weak)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    found = {(row["case"], row["what"], int(row["ranks"])): 100 * float(row["efficiency"]) for row in rows if row["efficiency"]}
    ranks = sorted({1, *(key[2] for key in found)})
    for case in dict.fromkeys(row["case"] for row in rows):
        points = [(n, found[case, "lighthouse p2p", n]) for n in ranks if (case, "lighthouse p2p", n) in found]
        left.plot(*zip((1, 100.0), *points, strict=True), "o-", label=case)
    for scheme, colour in COLOURS.items():
        whats = [(n, (DIAGONAL.get(n), f"lighthouse {scheme}", n)) for n in ranks]
        points = [(n, found[key]) for n, key in whats if key in found]
        right.plot(*zip((1, 100.0), *points, strict=True), "o-", color=colour, label=scheme)
    for axes, title in ((left, "Same length on all ranks, p2p"), (right, "131,072 tokens a rank, k = N/128")):
        axes.set(xticks=ranks, xlabel="GPUs", ylabel="% of one GPU's speed at that length", title=title, ylim=(0, 105))
        axes.legend(frameon=False, loc="lower left")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main(tables: Sequence[str], picture: str) -> None:
    check_one_device([Path(table) for table in tables])
    rows: list[dict[str, Any]] = []
    for table in tables:
        with Path(table).open() as file:
            rows += csv.DictReader(file)
    if len(tables) == 1:
        draw(Path(picture), rows, max(int(row["ranks"]) for row in rows))
    else:
        draw_ranks(Path(picture), rows)


if __name__ == "__main__":
    main(sys.argv[1:-1], sys.argv[-1])
