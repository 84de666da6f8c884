"""The tables of docs/performance.md that one H200 filled, held to the files that they link."""

from __future__ import annotations

import csv
import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
SECTION = (ROOT / "docs/performance.md").read_text().split("## One H200, 29 November 2026")[1]


def tables(text: str) -> list[list[list[str]]]:
    """The cells of each table, row by row, without the heading."""
    found: list[list[list[str]]] = []
    for before, line in zip(["", *text.splitlines()], text.splitlines(), strict=False):
        if line.startswith("|"):
            if not before.startswith("|"):
                found.append([])
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
    return [rows[2:] for rows in found]


def rows_of(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open() as file:
        return list(csv.DictReader(file))


def digits(number: float, unit: str) -> str:
    return f"{number:#.3g} {unit}".rstrip()


def rope() -> list[list[str]]:
    times: dict[int, list[str]] = {}
    for row in rows_of("rope/rope.csv"):
        times.setdefault(int(row["tokens"]), []).append(digits(float(row["forward+backward ms"]), "ms"))
    return [[f"{tokens:,}", *cells] for tokens, cells in times.items()]


def edges() -> list[list[str]]:
    runs = json.loads((RESULTS / "training_step/h200_edges/summary.json").read_text())["runs"]
    names = {
        "dense": "dense",
        "lighthouse, first and last two layers dense": "first and last two dense",
        "lighthouse, edge layers with twice the budget": "first and last two with twice the budget",
    }
    return [
        [names[run["run"]], digits(run["seconds a step"], ""), digits(run["times dense"], ""), f"{run['peak GiB']:.1f} GiB"]
        for run in runs
    ]


def host() -> list[list[str]]:
    times: dict[int, list[str]] = {}
    for row in rows_of("host_time/host_time.csv"):
        times.setdefault(int(row["N"]), []).append(f"{float(row['us']):.0f}")
    return [[f"{tokens:,}", *cells] for tokens, cells in times.items()]


def test_tables_are_those_of_the_files() -> None:
    assert tables(SECTION) == [rope(), edges(), host()]


def test_steps_under_graphs_are_their_file() -> None:
    words = " ".join((ROOT / "docs/performance.md").read_text().split())
    seconds = {
        (row["run"].split(",")[0], row["graphs"], row["attention"]): float(row["seconds a step"])
        for row in rows_of("training_step/h200_graphs/steps.csv")
    }
    whole, too, (cudnn, flash) = "full_iteration", "full_iteration, the optimizer too", ("cuDNN", "FlashAttention 4")
    ours = {kind: seconds["lighthouse", too, kind] for kind in (cudnn, flash)}
    dense = {kind: seconds["dense", "none", kind] for kind in (cudnn, flash)}
    assert f"| `local` | {seconds['lighthouse', 'local', cudnn]:.4f} s | |" in words
    assert f"| `full_iteration` | {seconds['lighthouse', whole, cudnn]:.4f} s | |" in words
    assert f"| the optimizer's step too | {ours[cudnn]:.4f} s | **{ours[flash]:.4f} s** |" in words
    assert f"| {dense[cudnn]:.4f} s | {dense[flash]:.4f} s |" in words
    gains = dense[cudnn] / ours[cudnn], dense[flash] / ours[flash], dense[cudnn] / ours[flash]
    assert "is {:.2f} times as fast as dense with cuDNN, and {:.2f} times with FlashAttention 4".format(*gains[:2]) in words
    assert f"the best step is {gains[2]:.2f} times as fast" in words
