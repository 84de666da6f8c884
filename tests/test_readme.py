"""Every figure of the README's table is that of the file which its row names."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
GPUS = {"h100": "H100", "h200": "H200", "NVIDIA H100 80GB HBM3": "H100"}


def figures(text: str) -> list[list[str]]:
    """The cells of its first table, row by row, without the heading."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def named(cell: str) -> tuple[str, Path]:
    """The words of a link, and the file that it leads to."""
    found = re.fullmatch(r"\[(.+)\]\((.+)\)", cell)
    assert found, cell
    return found[1], ROOT / found[2]


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open() as table:
        return list(csv.DictReader(table))


def digits(number: float) -> str:
    """At least three, and every digit before the point."""
    return f"{number:.0f}" if number >= 1000 else f"{number:.1f}" if number >= 100 else f"{number:#.3g}"


def layer(length: int, file: Path) -> list[str]:
    found = json.loads(file.with_suffix(".json").read_text())
    times = {}
    for row in rows_of(file):  # the setting of the default pyramid comes first of each length
        if int(row["N"]) == length and row["direction"] == "fwd+bwd" and row["ms"]:
            times.setdefault(row["what"], float(row["ms"]))
    dense, ours = times["dense cudnn"], times["lighthouse"]
    return [f"{digits(dense)} ms", f"{digits(ours)} ms", f"{dense / ours:.1f}×", GPUS[found["device"]]]


def iteration(length: int, file: Path) -> list[str]:
    """On the fewest GPUs of which the file has a run."""
    runs = [row for row in rows_of(file) if int(row["seq_length"]) == length]
    gpus = min(int(row["gpus"]) for row in runs)
    times = {row["attention"]: row for row in runs if int(row["gpus"]) == gpus}
    dense, ours = (float(times[attention]["seconds_a_step"]) for attention in ("dense", "lighthouse"))
    device = GPUS[times["lighthouse"]["device"]]
    return [f"{digits(dense)} s", f"{digits(ours)} s", f"{dense / ours:.1f}×", device if gpus == 1 else f"{gpus} {device}"]


def held_out(file: Path) -> list[str]:
    """Of the recipe, each seed against its own dense run."""
    runs = {row["run"]: row for row in rows_of(file.with_name("runs.csv"))}
    judged = [
        row for row in rows_of(file) if row["run"].startswith("norm-60") and row["steady_ratio"] and row["same_gpu"] == "yes"
    ]
    assert [row["against"] for row in judged] == ["dense", "dense-2"]
    losses = [[f"{float(runs[row[side]]['held_out_loss']):.3f}" for row in judged] for side in ("against", "run")]
    (ratio,) = {f"{float(row['steady_ratio']):.2f} of the time" for row in judged}
    (device,) = {GPUS[runs[row["run"]]["device"]] for row in judged}
    return [", ".join(losses[0]), ", ".join(losses[1]), ratio, device]


def published(length: int, file: Path) -> list[str]:
    """Beside the dense run that others have published: eight H100s, 137 s a step."""
    dense, (row,) = length / 8 / 137, [row for row in rows_of(file) if row["name"] == f"0.6b-{length}"]
    ours = float(row["tokens a second"])
    return [f"{dense:.0f} tokens/s/GPU", f"{ours:,.0f} tokens/s/GPU", f"{ours / dense:.1f}×", "H200"]


def expected(label: str, file: Path) -> list[str]:
    if label.startswith("held-out loss"):
        return held_out(file)
    found = re.fullmatch(r"(layer|iteration|Qwen3-0.6B), ([\d,]+) tokens", label)
    assert found, f"the README's row {label!r} is held to no result"
    kinds = {"layer": layer, "iteration": iteration, "Qwen3-0.6B": published}
    return kinds[found[1]](int(found[2].replace(",", "")), file)


def wrong(text: str) -> list[str]:
    """The rows that are not what their files say."""
    rows = [(cells, *named(cells[-1])) for cells in figures(text)]
    return [cells[0] for cells, words, file in rows if [*cells[1:-1], words] != expected(cells[0], file)]


def test_figures_are_those_of_the_files_that_they_name() -> None:
    assert len(figures(README)) == 6
    assert wrong(README) == []


@pytest.mark.parametrize("row", range(6))
@pytest.mark.parametrize("column", [1, 2, 3])
def test_another_figure_is_noticed(row: int, column: int) -> None:
    cells = figures(README)[row]
    cell = cells[column]
    changed = re.sub(r"\d(?=\D*$)", lambda digit: str((int(digit[0]) + 1) % 10), cell)
    line = next(line for line in README.splitlines() if line.startswith(f"| {cells[0]} |"))
    assert wrong(README.replace(line, line.replace(f"| {cell} |", f"| {changed} |"))) == [cells[0]]


def test_the_words_below_are_those_of_the_runs() -> None:
    words = " ".join(README.split())
    for attention in ("dense", "lighthouse"):
        run = json.loads((ROOT / f"benchmarks/results/scaling/runs/{attention}-98304-cp1/run.json").read_text())
        assert f"of a {run['layers']}-layer GPT over bytes" in words
    lighthouse = run["layers"] - run["dense_first"] - run["dense_last"]
    assert f"GPT over bytes, {lighthouse} layers Lighthouse" in words
    recipe = next(row for row in rows_of(ROOT / "experiments/results/recipe/runs.csv") if row["run"] == "norm-60")
    assert f"for {int(recipe['switch']) / int(recipe['iterations']):.0%} of its iterations with Lighthouse" in words


def test_it_is_short() -> None:
    assert len(README.split()) <= 450


def test_what_both_stages_gain_is_that_of_the_models_page() -> None:
    """The first stage alone is several times as fast."""
    page = (ROOT / "docs/models.md").read_text()
    rows = [line.split(" | ") for line in page[: page.index("- **B200s**")].splitlines() if "×" in line]
    first, whole = ([float(row[column].rstrip("×")) for row in rows] for column in (3, 4))
    assert f"predicts {min(whole):.1f} to {max(whole):.1f}× over both stages" in README
    assert "a first stage several times as fast" in README
    assert max(first) > 3
