"""Results of mixed folders: what is compared with what, and pictures that can be read."""

from __future__ import annotations

import csv
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_lighthouse import ticks
from megatron_lighthouse.plan import alike, scaling, scaling_plots
from tests.plan.test_scaling import write

LIGHTHOUSE, DENSE = {"attention": "lighthouse"}, {"attention": "dense"}
OTHERS: dict[str, dict[str, Any]] = {
    "device": {"device": "h200"},
    "dense layers": {"dense_first": 0, "dense_last": 0},
    "around": {"around": "parallax"},
    "edge budget": {"edge_budget": 3072},
    "recipe": {"recipe": "530m-1m"},
    "budget": {"budget": 3072},
    "levels": {"levels": 2},
    "recompute": {"recompute": "full"},
    "tensor parallel": {"tensor_parallel": 2, "gpus": 2},
    "sequences": {"global_batch": 4},
    "GPUs": {"gpus": 8},
    "no device": {"device": None},
    "sizes": {"hidden": 2048},
    "scorer": {"scorer": "summary"},
    "scorer, in its command line": {"arguments": "--attention lighthouse --lighthouse-scorer gla --lighthouse-scorer summary"},
    "layers": {"arguments": "--transformer-impl local"},
}


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "find_spec", lambda _: None)


def collected(tmp_path: Path) -> tuple[dict[str, dict[str, str]], str]:
    said = scaling.collect([tmp_path / "runs"], tmp_path / "out")
    with (tmp_path / "out" / "scaling.csv").open() as file:
        return {row["run"]: row for row in csv.DictReader(file)}, said


@pytest.mark.parametrize("other", OTHERS)
def test_efficiency_is_over_runs_of_the_same_kind(other: str, tmp_path: Path) -> None:
    """One rank of another kind, nine times as slow: no run of 2 ranks is compared with it, and its one rank with none."""
    base = {**LIGHTHOUSE, "gpus": 1, "context_parallel": 1}
    write(tmp_path / "runs" / "one", 6, 1000.0, 10.0, **base)
    write(tmp_path / "runs" / "two", 6, 625.0, 10.0, **{**base, "gpus": 2, "context_parallel": 2})
    write(tmp_path / "runs" / "other", 6, 9000.0, 10.0, **{**base, **OTHERS[other]})
    if OTHERS[other].get("device", "h200") is None:
        path = tmp_path / "runs" / "other" / "run.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "device"}))
    rows, said = collected(tmp_path)
    assert float(rows["two"]["efficiency"]) == pytest.approx(0.8, abs=1e-3)
    assert float(rows["one"]["efficiency"]) == float(rows["other"]["efficiency"]) == 1
    assert "lighthouse runs differ in" in said or other in ("budget", "levels", "recompute", "edge budget")


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for study in ("h100/a", "h200/a", "h200/b"):
        write(tmp_path / "runs" / study, 6, 1000.0, 10.0, **LIGHTHOUSE, gpus=1, context_parallel=1, device=study[:4])
    rows, _ = collected(tmp_path)
    assert list(rows) == ["h100/a", "h200/a", "b"]


def test_what_is_predicted_has_the_runs_scorer(tmp_path: Path) -> None:
    for scorer in ("norm", "dilated"):
        words = f"--attention lighthouse --lighthouse-scorer {scorer}"
        write(tmp_path / "runs" / scorer, 6, 1000.0, 10.0, **LIGHTHOUSE, gpus=1, context_parallel=1, arguments=words)
    rows, _ = collected(tmp_path)
    norm, dilated = (float(rows[scorer]["predicted_tokens_s_gpu"]) for scorer in ("norm", "dilated"))
    assert dilated < 0.9 * norm


def test_what_means_nothing_to_dense_attention_parts_no_runs(tmp_path: Path) -> None:
    write(tmp_path / "runs" / "one", 6, 1000.0, 10.0, **DENSE, context_parallel=1, budget=512, dense_first=1)
    write(tmp_path / "runs" / "two", 6, 500.0, 10.0, **DENSE, context_parallel=2, gpus=2, cp_comm_type="all_gather")
    rows, said = collected(tmp_path)
    assert rows["two"]["efficiency"] == "1.0"  # and one rank exchanges nothing, by any scheme
    assert "budget" not in said.split("last_loss")[1]


def test_a_run_alone_has_no_efficiency_and_repeated_ones_their_median(tmp_path: Path) -> None:
    write(tmp_path / "runs" / "alone", 6, 1000.0, 10.0, **DENSE, context_parallel=4, gpus=4)
    for name, ms in (("first", 1000.0), ("second", 2000.0), ("third", 4000.0)):
        write(tmp_path / "runs" / name, 6, ms, 10.0, **LIGHTHOUSE, context_parallel=1)
    rows, said = collected(tmp_path)
    assert rows["alone"]["efficiency"] == ""
    assert "alone: no run of its kind and length on other ranks" in said
    assert [rows[name]["efficiency"] for name in ("first", "second", "third")] == ["2.0", "1.0", "0.5"]
    assert "are runs of the same" in said


def test_a_study_on_all_gpus_of_a_job_ends_with_all_of_them_in_one_sequence(tmp_path: Path) -> None:
    for ranks in (1, 2, 4, 8):
        write(tmp_path / "runs" / f"cp{ranks}", 6, 8000.0 / ranks, 10.0, **DENSE, context_parallel=ranks, gpus=8)
    rows, said = collected(tmp_path)
    assert {row["efficiency"] for row in rows.values()} == {"1.0"}
    assert "differ" not in said


def lines(figure: Figure) -> list[tuple[str, list[float]]]:
    found = [line for axes in figure.axes for line in axes.get_lines() if line.get_linestyle() != "None"]
    return [(str(line.get_label()), [float(x) for x in line.get_xdata()]) for line in found]


def mixed() -> list[alike.Row]:
    rows = []
    for device in ("h200", "h100"):
        for dense in (0, 2):
            for length in (1048576, 98304, 131072, 100000):
                for ranks in (8, 1, 2):
                    info = {**LIGHTHOUSE, "recipe": "530m-98k", "seq_length": length, "context_parallel": ranks, "gpus": ranks}
                    info |= {"device": device, "dense_first": dense, "dense_last": dense, "budget": length // 64}
                    rows.append({**info, "run": "r", "folder": "f", "kind": alike.kind(info), "tokens_s_gpu": 1000.0 + length})
    return rows


def test_lines_go_through_runs_of_one_kind_and_legends_are_in_order() -> None:
    figure = scaling_plots.picture(mixed(), "tokens_s_gpu", None, "tokens/s/GPU")
    assert figure
    for name, x in lines(figure):
        assert len(set(x)) == len(x), f"{name} is vertical somewhere"
    names = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes]  # type: ignore[union-attr]
    assert names[0][:2] == [
        "lighthouse, 98,304 tokens, h100, 0 dense first, 0 dense last",
        "lighthouse, 98,304 tokens, h100, 2 dense first, 2 dense last",
    ]
    assert [name.split(",")[1] for name in names[1]] == [" CP 1"] * 4 + [" CP 2"] * 4 + [" CP 8"] * 4
    assert len(names[0]) == 16


@pytest.mark.parametrize(
    "lengths", [[98304, 100000, 131072], [8192 + 128 * i for i in range(40)], [1 << i for i in range(8, 24)], [777]], ids=len
)
def test_tick_labels_do_not_overlap(lengths: list[int]) -> None:
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    axes, _ = figure.subplots(1, 2)
    axes.plot(lengths, lengths)
    ticks.along_log2(axes, lengths)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    shown = [label for label in axes.get_xticklabels() if label.get_text()]
    boxes = sorted(label.get_window_extent(canvas.get_renderer()).extents.tolist() for label in shown)
    assert all(left[2] < right[0] for left, right in pairwise(boxes))
    assert {ticks.tokens(lengths[0]), ticks.tokens(lengths[-1])} <= {label.get_text() for label in shown}


def test_a_picture_of_many_series_leaves_room_to_see_them() -> None:
    figure = scaling_plots.picture(mixed(), "tokens_s_gpu", None, "tokens/s/GPU")
    assert figure
    FigureCanvasAgg(figure).draw()
    assert all(axes.get_position().height * figure.get_size_inches()[1] > 3 for axes in figure.axes)


def test_no_line_lies_on_the_frame() -> None:
    """As efficiencies of 1, of which a picture's highest value is one."""
    figure = scaling_plots.picture([row | {"efficiency": 1.0} for row in mixed()], "efficiency", None, "efficiency")
    assert figure is not None
    for axes in figure.axes:
        assert axes.get_ylim() == pytest.approx((0, 1.08))
