"""What pictures say: positions where they are, and legends of what is drawn."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from matplotlib.figure import Figure

from experiments import plots
from megatron_lighthouse.recipe import evaluation_plots

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import together


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that would be written."""
    figures: list[Figure] = []
    for module in (evaluation_plots, plots):
        monkeypatch.setattr(module, "_save", lambda figure, path: figures.append(figure))
    return figures


def test_position_0_stands_at_0(drawn: list[Figure]) -> None:
    rows = [{"start": a, "stop": b, "loss": 1.0, "standard_error": 0.1} for a, b in ((0, 1), (1, 2), (2, 4), (4, 8))]
    evaluation_plots.loss_by_position(rows, Path("loss.png"), "", unit="token")
    (axes,) = drawn[0].axes
    assert list(axes.get_lines()[0].get_xdata()) == [0, 1, 2.5, 5.5]
    assert axes.get_xticklabels()[0].get_text() == "0"
    assert axes.get_ylabel() == "held-out loss (nats per token)"


@pytest.mark.parametrize("warmup", [None, 2])
@pytest.mark.parametrize("back", [None, 4])
def test_a_legend_explains_the_marks_that_are_drawn(
    back: int | None, warmup: int | None, drawn: list[Figure], monkeypatch: Any
) -> None:
    row = {"run": "norm-60", "title": "", "at_once": 2, "smooth": 1, "switch": 4, "dense_from": 5, "steps": 9, "warmup": warmup}
    points = [{"iteration": i, "loss": 3.0 / i, "seconds": 1.0} for i in range(1, 10)]
    tables = {"runs": [{**row, "iterations_to_recover": back}], "curves": points}
    results = SimpleNamespace(
        tables=tables,
        runs={"dense": None, "norm-60": None},
        of=lambda *_: points,
        losses=lambda _: dict.fromkeys(range(10), 1.0),
    )
    monkeypatch.setattr(plots, "dense_of", lambda *_: "dense")
    plots._loss(results, Path("loss.png"))  # type: ignore[arg-type]
    title = drawn[0].axes[0].get_title()
    assert "●: switch" in title
    assert ("□" in title) == (back is not None)
    assert ("▼: Lighthouse begins" in title) == (warmup is not None)


def test_tables_of_two_devices_are_not_drawn_as_one(tmp_path: Path) -> None:
    tables = [tmp_path / f"{name}.csv" for name in ("first", "second", "third", "unknown")]
    for table, device in zip(tables, ("H100", "H200", "H200"), strict=False):
        table.with_suffix(".json").write_text(json.dumps({"device": device}))
    together.check_one_device(tables[1:])
    with pytest.raises(SystemExit, match=r"(?s)different devices.*H100: .*first\.csv\n  H200: .*second\.csv .*third\.csv"):
        together.check_one_device(tables)
    assert together.medians([(2, 5.0), (1, 1.0), (2, 7.0), (2, 6.0)]) == [(1, 1.0), (2, 6.0)]
