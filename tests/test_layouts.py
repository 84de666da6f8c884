"""`benchmarks/layouts.py`: what four and eight GPUs are to run is there, has the time it takes, and makes one table."""

from __future__ import annotations

import importlib
import shlex
from fnmatch import fnmatch
from typing import Any

import pytest

from megatron_lighthouse.launch.torchrun import ROOT
from megatron_lighthouse.plan import memory

MINUTES = 30 * 60
START = 25
"""Seconds of a run beside its steps, at least: two GPUs took 25 to 45, the next run's overlapping."""
FULLEST = 120 * 2**30


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def layouts(load: Any) -> Any:
    return load("layouts")


@pytest.fixture
def cases(load: Any) -> dict[int, Any]:
    """Of the session, by GPUs."""
    module = load("session_cases")
    return {4: module.FOUR, 8: module.EIGHT}


def runs_of(case: Any, runs: list[Any]) -> list[Any]:
    """Those that a case trains."""
    words = shlex.split(case.words)
    names = words[words.index("--runs") + 1 :] if "benchmarks/layouts.py" in words else []
    return [run for run in runs if any(fnmatch(run.name, name) for name in names)]


@pytest.mark.parametrize("gpus", [4, 8])
def test_every_run_is_in_one_case_that_has_time_for_it(layouts: Any, cases: dict[int, Any], gpus: int) -> None:
    runs = layouts.RUNS[gpus]
    trained = [run.name for case in cases[gpus] for run in runs_of(case, runs)]
    assert sorted(trained) == sorted(run.name for run in runs)
    assert len({*trained}) == len(trained)
    assert sum(case.limit for case in cases[gpus]) < MINUTES
    for case in cases[gpus]:
        assert case.gpus == gpus
        assert case.name.startswith(("four-", "eight-")[gpus // 8])
        assert sum(START + run.steps * run.predicted for run in runs_of(case, runs)) < case.limit
    for run in runs:
        assert run.gpus == gpus
        assert memory.total(run.planned) < FULLEST


def test_four_gpus_have_what_their_issue_asks_for(layouts: Any) -> None:
    four = [(run.recipe, run.attention, run.tokens) for run in layouts.FOUR]
    wanted = [("all layers", 2**20), ("all layers", 2**22), ("dense", 2**20)]
    assert {("qwen3-0.6b-1m-1gpu", *one) for one in wanted} <= {*four}
    assert {("530m-1m", how, 2**20) for how in ("edge budgets", "all layers", "dense edges")} <= {*four}
    schemes = {(run.tensor, run.pipeline, run.context, run.scheme) for run in layouts.FOUR}
    assert {(*size, 2, scheme) for size in ((2, 1), (1, 2)) for scheme in ("all_gather", "a2a")} <= schemes


def test_eight_gpus_have_what_their_issue_asks_for(layouts: Any) -> None:
    eight = [(run.attention, run.tensor, run.context, run.steps) for run in layouts.EIGHT]
    assert {run.recipe for run in layouts.EIGHT} == {"qwen3-8b-1m-8gpu"}
    assert {("all layers", 2, 4, 10), ("edge budgets", 2, 4, 10), ("all layers", 1, 8, 5), ("all layers", 4, 2, 5)} <= {*eight}


def test_a_recipes_own_layout_is_the_recipe(layouts: Any) -> None:
    """What a run says in its place is what it says."""
    run = layouts.EIGHT[0]
    recipe = layouts.recipe_words(ROOT / "launch" / "recipes" / f"{run.recipe}.args")
    assert layouts.run_of_words(recipe, layouts.H200, 8) == run.planned


def test_the_docs_predict_what_the_plan_says(layouts: Any) -> None:
    """Row by row, in the order of the runs."""
    page = (ROOT / "docs" / "scaling.md").read_text()
    table = page.split("### Long sequences on four and eight H200s")[1].split("\n\n")[2]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    runs = [run for runs in layouts.RUNS.values() for run in runs]
    for run, (_, tokens, layout, seconds, gib) in zip(runs, rows, strict=True):
        assert tokens == {98304: "98K", 2**20: "1M", 2**22: "4M"}[run.tokens]
        assert layout.replace("`", "").replace("P ", "P") in run.layout
        assert float(seconds) == pytest.approx(run.predicted, rel=5e-3)
        assert float(gib) == pytest.approx(memory.total(run.planned) / 2**30, rel=5e-3)


def test_how_runs_stand_beside_each_other(layouts: Any) -> None:
    alike = {"recipe": "a", "tokens": 4, "sequences": 1, "GPUs": 8}
    rows = [
        {**alike, "attention": "all layers", "seconds a step": 4.0, "first step": 5.0, "predicted": 2.0},
        {**alike, "attention": "all layers", "seconds a step": 3.0, "first step": 5.0, "predicted": 2.5},
        {**alike, "attention": "all layers", "seconds a step": None, "first step": None, "predicted": 1.0},
        {**alike, "attention": "edge budgets", "seconds a step": 5.0, "first step": 5.0, "predicted": 3.0},
        {**alike, "attention": "dense", "seconds a step": None, "first step": 60.0, "predicted": 50.0},  # cut off
    ]
    layouts.beside(rows)
    assert [row["place"] for row in rows] == [2, 1, None, None, None]
    assert [row["place by the plan"] for row in rows] == [1, 2, None, None, None]
    assert [row["times dense"] for row in rows] == [15.0, 20.0, None, 12.0, None]


def test_what_a_log_says(layouts: Any) -> None:
    run = layouts.EIGHT[0]
    log = "\n".join(f"elapsed time per iteration (ms): {1000 * x} | lm loss: {x}.5E+00" for x in (9, 9, 9, 4, 4, 6))
    found = run.found(log)
    assert (found["seconds a step"], found["first step"]) == (4.0, 9.0)
    assert found["tokens a second and GPU"] == 2**20 // 4 // 8
    assert found["losses"] == [9.5, 9.5, 9.5, 4.5, 4.5, 6.5]
    assert layouts.FOUR[-1].warm == 1
