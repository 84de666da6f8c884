"""benchmarks/quality.py: runs that the product takes, statistics by hand, and two short runs whose tables agree."""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from megatron_lighthouse.mcore.command_line import settings
from megatron_lighthouse.plots import read_scalars
from megatron_lighthouse.recipe import recovery
from megatron_lighthouse.recipe.positions import mean_and_error
from tests.mcore.harness import ROOT
from tests.tolerances import assert_close

sys.path.append(str(ROOT / "benchmarks"))
import quality
import quality_pairs as pairs
import quality_results as results
from quality_runs import BASE, EXPERIMENTS, Size, attention_arguments

STEPS, SEQUENCE = 10, 256


def size_of(experiment: str) -> Size:
    one = EXPERIMENTS[experiment]
    return Size(experiment, one.seq_length, one.steps, one.batch)


@pytest.mark.parametrize(("experiment", "name"), [(one, name) for one in EXPERIMENTS for name in EXPERIMENTS[one].runs])
def test_every_run_is_one_that_the_product_takes(experiment: str, name: str) -> None:
    size, run = size_of(experiment), EXPERIMENTS[experiment].runs[name]
    parser = settings.add_arguments(argparse.ArgumentParser(allow_abbrev=False))
    args, rest = parser.parse_known_args(attention_arguments(run, size))
    assert (args.attention == "lighthouse") == bool(run.share)
    more = "--context-parallel-size 2 --high-priority-stream-groups cp " if run.ranks == 2 else ""
    more += f"--lighthouse-telemetry-interval {size.steps // 10} " if run.telemetry else ""
    more += f"--exit-interval {run.until}" if run.until else ""
    assert rest == more.split()
    assert set(run.against) <= EXPERIMENTS[experiment].runs.keys()
    if args.attention == "lighthouse":
        found = settings.settings_from(args)
        assert found.config.geometry(size.seq_length)
        assert found.stage2 is not None
        assert not list(found.stage2.problems(size.steps))
        assert found.stage2.at == run.switch(size.steps) == size.steps * run.share // 100
        assert found.stage2.at + found.stage2.over == run.dense_from(size.steps)


def test_help_names_the_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        quality.main(["--help"])
    assert stopped.value.code == 0
    assert f"{BASE}: {EXPERIMENTS['recipe'].runs[BASE].title}" in capsys.readouterr().out


def test_variants_change_one_thing() -> None:
    runs, size = EXPERIMENTS["variants"].runs, size_of("variants")
    base = attention_arguments(runs[BASE], size)
    budget, tile = (base.index(f"--lighthouse-{name}") + 1 for name in ("budget", "tile-budget"))
    found = {name: attention_arguments(run, size) for name, run in runs.items() if run.share}
    changed = {name: [i for i, (a, b) in enumerate(zip(base, found[name], strict=False)) if a != b] for name in found}
    assert changed["norm-60-again"] == []
    for name in ("norm-75", "summary-60", "dilated-60"):
        assert len(changed[name]) == 1, name
    for name, k in (("half-budget", "256"), ("double-budget", "1024")):
        assert (changed[name], found[name][budget]) == ([budget, tile], k)
    # k/m tiles: how far ahead a selection sees
    assert {int(arguments[budget]) / int(arguments[tile]) for arguments in found.values()} == {4}


def test_a_run_of_another_experiment_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        quality.main(["--experiment", "tiny", "--runs", "summary-60"])
    said = " ".join(capsys.readouterr().err.split())
    assert "--runs summary-60 is not one of --experiment tiny: dense, norm-60, dense-2, norm-60-2, cp-2." in said


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--at-once 0", "--at-once 0 must be at least 1."),
        ("--hindsight-samples -1", "--hindsight-samples -1 must be at least 1, or 0 for no hindsight."),
        ("--seq-length 1024", "--held-out has 513 tokens: --hindsight-samples needs at least 2048"),
    ],
)
def test_refused_before_a_run_is_trained(
    options: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    (tmp_path / "corpus" / "held-out").mkdir(parents=True)
    (tmp_path / "corpus" / "train").mkdir()
    for part in ("train", "held-out"):
        (tmp_path / "corpus" / part / "1.txt").write_text(512 * "a")
    paths = [f"--{name}={tmp_path / name}" for name in ("corpus", "work", "out")]
    with pytest.raises(SystemExit):
        quality.main(["--experiment", "tiny", "--runs", BASE, *paths, *options.split()])
    assert says in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


LOG = """
 [2026-11-25 00:00:00] iteration {i:8d}/      10 | consumed samples: {i:12d} | elapsed time per iteration (ms): {ms} | \
learning rate: 1.000000E-03 | global batch size:     1 | lm loss: {loss} | loss scale: 1.0 | grad norm: 2.0 |
"""


def lines(*points: tuple[int, str, str]) -> str:
    return "".join(LOG.format(i=i, ms=ms, loss=loss) for i, ms, loss in points)


def test_a_log_that_was_taken_up_again() -> None:
    first = lines((1, "900.0", "5.000000E+00"), (2, "500.0", "4.500000E+00"), (6, "100.0", "9.000000E+00"))
    again = lines((3, "800.0", "3.500000E+00"), (4, "500.0", "3.000000E+00"), (5, "200.0", "2.000000E+00"))
    found = [(p["iteration"], p["loss"], p["seconds"]) for p in results.curve(first + results.STARTED + again)]
    # what Megatron logs of a process's second iteration is the mean of two
    assert found == [(1, 5.0, 0.9), (2, 4.0, 0.1), (3, 3.5, 0.8), (4, 2.5, 0.2), (5, 2.0, 0.2)]


def facts(run: str, **more: Any) -> dict[str, Any]:
    known = {
        "experiment": "short",
        "title": EXPERIMENTS["short"].runs[run].title,
        "seed": 1,
        "ranks": 1,
        "at_once": 1,
        "seq_length": 4,
        "tokens": 8,
        "steps": 5,
        "smooth": 2,
    }
    return {"run": run, **known, "switch": 0, "dense_from": 1, **more}


def test_a_row_by_hand() -> None:
    seconds = [9.0, 1.0, 1.0, 5.0, 2.0]
    points = [{"iteration": i + 1, "loss": 5.0 - i, "seconds": s} for i, s in enumerate(seconds)]
    row = results.run_row(facts(BASE, switch=3, dense_from=4), points, None)
    # three iterations, of whose second half the median is 1 second, two of whose second half it is 2
    assert (row["seconds"], row["steady_seconds"], row["tokens"], row["training_loss"]) == (18.0, 7.0, 40, 1.5)
    assert (row["tokens_per_second_lighthouse"], row["tokens_per_second_dense"]) == (8.0, 4.0)
    # 2 and 1 after a level of 3.5, the mean of 4 and 3
    assert (row["level"], row["spike"], row["iterations_to_recover"], row["held_out_loss"]) == (3.5, -1.5, 0, None)


def made(run: str, losses: list[list[float]], curve: list[float], **more: Any) -> results.Results:
    """Of sequences of four tokens in the buckets 0, 1 and 2-3."""
    found = results.Results(facts={"experiment": "short", "corpus": {}, "runs": {run: facts(run, **more)}})
    found.tables["curves"] = [{"run": run, "iteration": i + 1, "loss": x, "seconds": 1.0} for i, x in enumerate(curve)]
    names = ("run", "starts_at", "document", "0", "1", "2")
    found.tables["sequences"] = [dict(zip(names, (run, 4 * i, i, *x), strict=True)) for i, x in enumerate(losses)]
    return found


DENSE = made("dense", [[1.0, 1.0, 1.0], [5.0, 3.0, 2.0]], [3.0, 2.0, 1.0])
OURS = made(BASE, [[2.0, 1.0, 1.5], [5.0, 4.0, 4.0]], [3.5, 2.0, 2.0])


def test_pairs_by_hand(tmp_path: Path) -> None:
    pairs.write(results.merged([DENSE, OURS]), tmp_path)
    (pair,) = results.read_csv(tmp_path / "pairs.csv")
    # by sequence (1 + 0 + 2 * 0.5) / 4 = 0.5 and (0 + 1 + 2 * 2) / 4 = 1.25, which are 0.375 either side of their mean
    assert (pair["run"], pair["against"], pair["sequences"]) == (BASE, "dense", 2)
    assert_close(numpy.array([pair["difference"], pair["standard_error"]]), [0.875, 0.375], "float64")
    assert (pair["gap"], pair["greatest_distance_at_first"], pair["mean_distance"]) == (0.5, 1.0, 0.5)
    assert pair["iterations_to_catch_up"] is None  # from no switch
    above = [row["above"] for row in results.read_csv(tmp_path / "positions.csv") if row["run"] == BASE]
    assert above == [0.5, 0.5, 1.25]


RESULTS = ROOT / "benchmarks" / "results" / "quality"


def missing_in_docs(rows: list[str]) -> list[str]:
    text = (ROOT / "docs" / "quality.md").read_text()
    return [row for row in (row.replace("-0.", "−0.").replace("| -", "| −") for row in rows) if row not in text]


def test_docs_say_what_the_recipe_gave() -> None:
    """The table of docs/quality.md, from its results."""
    found = results.read(RESULTS / "recipe")
    runs = {row["run"]: row for row in found.tables["runs"]}
    above = {row["run"]: row for row in pairs.pairs(found) if row["against"].startswith("dense")}
    mean = (above[BASE]["difference"] + above[f"{BASE}-2"]["difference"]) / 2
    rows = [f"| mean | | | **{mean:+.4f}** (it was to be at most +0.005) |"]
    for dense, run in (("dense", BASE), ("dense-2", f"{BASE}-2")):
        ours, theirs, pair = runs[run], runs[dense], above[run]
        assert pair["same_gpu"] == "yes"
        held_out = f"{pair['difference']:+.4f} ± {pair['standard_error']:.4f}"
        rows.append(f"| {theirs['held_out_loss']:.4f} | {ours['held_out_loss']:.4f} | {held_out} |")
        rows.append(f"| {theirs['steady_seconds']:.0f} | {ours['steady_seconds']:.0f} | **{pair['steady_ratio']:.3f}**")
        speeds = [ours[f"tokens_per_second_{stage}"] for stage in ("lighthouse", "dense")]
        rows.append(f"| {theirs['tokens_per_second_dense']:,.0f} | {speeds[0]:,.0f} and {speeds[1]:,.0f} | |")
        for filler in ("noise", "classic"):
            change, error = (pair[f"{filler}_accuracy_{what}"] for what in ("difference", "error"))
            accuracies = [row[f"{filler}_accuracy"] for row in (theirs, ours)]
            rows.append(f"| {accuracies[0]:.1%} | {accuracies[1]:.1%} | {change:+.1%} ± {error:.1%} |")
    for name, form in (("spike", "+.3f"), ("iterations_to_catch_up", ",.0f")):
        values = [({**runs[run], **above[run]})[name] for run in (BASE, f"{BASE}-2")]
        rows.append(f"| 1, 2 | | | {values[0]:{form}}, {values[1]:{form}} |")
    assert not missing_in_docs(rows)


def test_docs_say_what_the_variants_gave() -> None:
    """Both tables of them, likewise."""
    found = results.read(RESULTS / "variants")
    above = {(row["run"], row["against"]): row for row in pairs.pairs(found)}
    hindsight = {(row["run"], row["distance"]): row for row in found.tables["hindsight"]}

    def measured(row: dict[str, Any] | None, form: str, name: str, error: str) -> str:
        return f"{row[name]:{form}} ± {row[error]:{form.lstrip('+')}}" if row else ""

    def hint(run: str, distance: int, form: str) -> str:
        return measured(hindsight.get((run, distance)), form, "difference", "standard_error")

    rows = []
    for row in found.tables["runs"]:
        run = row["run"]
        if row["held_out_loss"] is None:
            continue
        losses = [measured(above.get((run, to)), "+.4f", "difference", "standard_error") for to in ("dense", BASE)]
        passkey = measured(above.get((run, "dense")), "+.1%", "noise_accuracy_difference", "noise_accuracy_error")
        spike = "" if row["spike"] is None else f"{row['spike']:+.2f}"
        cells = [f"`{run}`", f"{row['held_out_loss']:.4f}", *losses, f"{row['noise_accuracy']:.1%}", passkey, spike]
        rows.append(f"| {' | '.join([*cells, hint(run, 0, '.2f')])} |")
    assert len(rows) == 11
    for run in sorted({run for run, _ in hindsight}):
        last = hindsight[run, 0]
        mean = f"**{hint(run, 0, '.3f')}**" if run == BASE else hint(run, 0, ".3f")
        losses = [f"{last[name]:.3f}" for name in ("loss_true_future", "loss_other_future")]
        rows.append(f"| `{run}` | {' | '.join(losses)} | {mean} | {hint(run, 1, '.3f')} |")
    assert len(rows) == 15
    assert not missing_in_docs(rows)


def test_iterations_until_level_with_dense() -> None:
    """Counted from the switch; the mean of two differences is 1 in iteration 2, 0.75 and 0 in the next."""
    dense = made("dense", [], [3.0, 2.0, 1.0, 1.0])
    ours = made(BASE, [], [3.5, 3.0, 1.5, 0.5], switch=1, dense_from=2)
    assert pairs.training(results.merged([dense, ours]), BASE, "dense")["iterations_to_catch_up"] == 3


def test_sequences_of_one_document_count_as_one(tmp_path: Path) -> None:
    together = [results.merged([DENSE, OURS])]
    for row in together[0].tables["sequences"]:
        row["document"] = 7
    held_out = pairs.held_out(together[0], BASE, "dense")
    assert (held_out["documents"], held_out["difference"]) == (1, 0.875)
    assert numpy.isnan(held_out["standard_error"])
    values = numpy.array([1.0, 3.0, 2.0, 6.0])
    mean, error = mean_and_error(values, [0, 0, 1, 1])
    assert_close(numpy.array([mean, error]), [3.0, numpy.array([2.0, 4.0]).std(ddof=1) / 2**0.5], "float64")
    assert_close(mean_and_error(values, range(4))[1], mean_and_error(values)[1], "float64")


def asked(run: str, right: list[int], **more: Any) -> results.Results:
    """A finished run of that many seconds, and its answers to one question a digit."""
    found = made(run, [], [3.0], **more)
    row = {"run": run, "iterations": 5, "steps": 5, "at_once": 1, "seconds": 9.0, "gpu": "a"}
    found.tables["runs"] = [{**row, **more}]
    found.tables["passkey_by_question"] = [
        {"run": run, "filler": "noise", "length": 4, "depth": 0, "sample": i, "right": x, "log_probability": -float(i)}
        for i, x in enumerate(right)
    ]
    return found


def test_answers_and_seconds_in_pairs() -> None:
    both = results.merged([asked("dense", [1, 0, 0, 1], steady_seconds=8.0), asked(BASE, [1, 1, 0, 1], steady_seconds=6.0)])
    row = pairs.pair(both, BASE, "dense")
    assert row is not None
    assert (row["questions"], row["steady_ratio"], row["seconds_ratio"], row["same_gpu"]) == (4, 0.75, 1.0, "yes")
    # one question in four
    assert_close(numpy.array([row["noise_accuracy_difference"], row["noise_accuracy_error"]]), [0.25, 0.25], "float64")
    assert (row["noise_log_probability_difference"], row["classic_accuracy_difference"]) == (0, None)
    shared = results.merged([asked("dense", [1], steady_seconds=8.0), asked(BASE, [1], steady_seconds=6.0, at_once=2)])
    assert set(pairs.cost(shared, BASE, "dense").values()) == {None}
    others = results.merged([asked("dense", [1]), asked(BASE, [1, 1])])
    with pytest.raises(ValueError, match="different questions"):
        pairs.passkey(others, BASE, "dense")


def test_runs_of_different_seeds_read_different_text() -> None:
    both = results.merged([DENSE, made("dense-2", [], [3.0, 2.0], seed=2)])
    assert set(pairs.training(both, "dense-2", "dense").values()) == {None}
    same = results.merged([OURS, made("norm-75", [], [3.0, 2.0, 7.0], switch=2)])
    same.facts["runs"][BASE]["switch"] = 2
    found = pairs.training(same, "norm-75", BASE)
    assert (found["distance_before_switch"], found["early_distance"], found["mean_distance"]) == (0.25, 5.5 / 3, 5.5 / 3)


def test_what_the_later_folder_knows_counts() -> None:
    later = made("dense", [[0.0, 0.0, 0.0]], [1.0])
    both = results.merged([DENSE, OURS, later])
    assert both.losses("dense") == {1: 1.0}
    assert [row["run"] for row in both.tables["sequences"]] == ["dense", BASE, BASE]
    with pytest.raises(ValueError, match="different sequences"):
        pairs.pairs(both)
    with pytest.raises(ValueError, match=r"different steps \(5, 7\) do not compare"):
        results.merged([DENSE, made(BASE, [], [], steps=7)])


@dataclass(frozen=True)
class Bench:
    """What two commands side by side left."""

    work: Path
    out: Path
    options: list[str]

    def rows(self, name: str) -> list[dict[str, str]]:
        with (self.out / f"{name}.csv").open() as file:
            return list(csv.DictReader(file))

    def of(self, name: str, run: str, column: str) -> numpy.ndarray[Any, Any]:
        return numpy.array([float(row[column]) for row in self.rows(name) if row["run"] == run])


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    if torch.cuda.is_available():
        pytest.skip("there the benchmark itself is run")
    folder = tmp_path_factory.mktemp("quality")
    for part, source in (("train", "LICENSE"), ("held-out", "README.md")):
        (folder / "corpus" / part).mkdir(parents=True)
        (folder / "corpus" / part / "1.txt").write_bytes((ROOT / source).read_bytes())
    options = ["--experiment", "tiny", "--steps", str(STEPS), "--loss-sequences", "4", "--passkey-samples", "1"]
    options += ["--hindsight-samples", "2"]
    options += ["--corpus", str(folder / "corpus"), "--work", str(folder / "work"), "--out", str(folder / "out")]
    processes = []
    for number, run in enumerate(("dense", BASE)):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": str(number)}
        command = [sys.executable, str(ROOT / "benchmarks" / "quality.py"), "--runs", run, *options]
        log = (folder / f"{run}.txt").open("w")
        processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    statuses = [process.wait() for process in processes]
    assert not any(statuses), "".join(log.read_text()[-3000:] for log in folder.glob("*.txt"))
    return Bench(folder / "work", folder / "out", options)


def test_curves_are_those_of_tensorboard(bench: Bench) -> None:
    for run in ("dense", BASE):
        steps, losses = read_scalars(bench.work / run / "tensorboard")["lm loss"]
        assert list(bench.of("curves", run, "iteration")) == list(steps) == list(range(1, STEPS + 1))
        assert_close(bench.of("curves", run, "loss"), losses, "float32")
    assert list(read_scalars(bench.work / BASE / "tensorboard")["lighthouse/layers"][1]) == [2.0] * 6 + [0.0] * 4


def test_the_tables_agree(bench: Bench) -> None:
    widths = numpy.diff([*(int(name) for name in list(bench.rows("sequences")[0])[3:]), SEQUENCE])
    held_out = {}
    for row in bench.rows("runs"):
        run, losses = row["run"], bench.of("curves", row["run"], "loss")
        assert (row["iterations"], row["tokens"], row["switch"]) == ("10", "2560", {"dense": "0", BASE: "6"}[run])
        assert_close(numpy.float64(row["training_loss"]), losses[-2:].mean(), "float64")
        assert_close(numpy.float64(row["seconds"]), bench.of("curves", run, "seconds").sum(), "two decimals")
        held_out[run] = numpy.float64(row["held_out_loss"])
        assert_close(held_out[run], bench.of("positions", run, "loss") @ widths / SEQUENCE, "float64")
        # two lengths, five depths and two fillers, and one question of each
        cells = [row for row in bench.rows("passkey") if row["run"] == run]
        assert len(cells) == 20
        noise = [float(cell["log_probability"]) for cell in cells if cell["filler"] == "noise"]
        assert_close(numpy.float64(row["noise_log_probability"]), numpy.mean(noise), "float64")
        questions = bench.of("passkey_by_question", run, "log_probability")
        assert len(questions) == 20
        assert_close(questions, [float(cell["log_probability"]) for cell in cells], "float32")
    (pair,) = bench.rows("pairs")
    assert float(pair["steady_ratio"]) > 0
    assert_close(numpy.float64(pair["difference"]), held_out[BASE] - held_out["dense"], "float64")
    assert abs(float(pair["difference"])) > 0


def test_hindsight_is_of_the_checkpoint_at_the_switch(bench: Bench) -> None:
    rows = bench.rows("hindsight")
    assert {row["run"] for row in rows} == {BASE}
    assert [row["distance"] for row in rows][:3] == ["0", "1", "2"]
    assert json.loads((bench.work / BASE / "hindsight" / "evaluation.json").read_text())["iteration"] == 6


def test_remade_from_what_was_packed(bench: Bench, tmp_path: Path) -> None:
    with tarfile.open(bench.out / "work.tgz") as packed:
        assert not [name for name in packed.getnames() if "checkpoints" in name]
        packed.extractall(tmp_path / "work", filter="data")
    assert quality.main(["--remake", str(tmp_path / "work"), "--out", str(tmp_path / "out")]) == 0
    tables = sorted(file.name for file in bench.out.iterdir() if file.suffix == ".csv")
    assert {"pairs.csv", "runs.csv", "curves.csv", "passkey_by_question.csv"} <= set(tables)
    for name in (*tables, "quality.json"):
        assert (tmp_path / "out" / name).read_bytes() == (bench.out / name).read_bytes(), name


def test_a_table_that_cannot_be_written_ends_no_run(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(pairs, "write", broken)
    with pytest.raises(OSError, match="the disk is full"):
        quality.main(["--runs", "dense", BASE, *bench.options])
    said = capsys.readouterr().out
    assert "dense: done" in said
    assert f"{BASE}: done" in said
    assert said.count("could not be renewed: OSError: the disk is full") == 1


def test_recovery_is_what_the_report_finds_in_tensorboard(bench: Bench, tmp_path: Path) -> None:
    assert recovery.main([str(bench.work / BASE), "--smooth", "2", "--out", str(tmp_path)]) == 0
    (expected,) = results.read_csv(tmp_path / "recovery.csv")
    found = results.read_csv(bench.out / "runs.csv")[1]
    for name in ("level", "scatter", "spike"):
        assert_close(found[name], expected[name], "float32")
    for name in ("switch", "dense_from", "spike_iteration", "iterations_to_recover", "tokens_to_recover"):
        assert found[name] == expected[name], name


def test_quality_json_says_what_was_run(bench: Bench) -> None:
    found = json.loads((bench.out / "quality.json").read_text())["runs"]
    assert list(found) == ["dense", BASE]
    assert "--lighthouse-stage2-at 6" in found[BASE]["train"]
    assert "--attention dense" in found[BASE]["evaluate"]
    assert found["dense"]["held_out"] == found[BASE]["held_out"]
    assert {"torch", "megatron-core", "date", "device"} <= set(found["dense"]["versions"])


def test_again_starts_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    assert quality.main(["--runs", "dense", BASE, *bench.options]) == 0
    with pytest.raises(SystemExit):
        quality.main(["--runs", "dense", *bench.options, "--steps", "20"])
    assert "holds dense with --eval-interval 11 --train-iters 10, not --eval-interval 21" in capsys.readouterr().err


def test_side_by_side_and_one_that_ends_early(bench: Bench, tmp_path: Path) -> None:
    paths = ["--corpus", str(bench.work.parent / "corpus"), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    options = [*bench.options, "--passkey-samples", "0", *paths, "--at-once", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / "quality.py"), "--runs", "cp-2", "dense-2", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = results.read_csv(tmp_path / "out" / "runs.csv")
    assert [(row["run"], row["iterations"], row["at_once"]) for row in found] == [("dense-2", STEPS, 2), ("cp-2", 5, 2)]
    assert [row["held_out_loss"] is None for row in found] == [False, True]
    lines = done.stdout.splitlines()
    first, second = sorted(i for i, line in enumerate(lines) if ": training, " in line)
    assert second == first + 1  # and not a run later


def test_pictures(bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quality.main(["--draw", str(bench.out), "--out", str(tmp_path)]) == 0
    for name in ("loss", "positions", "passkey", "cost", "hindsight"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert f"| `{BASE}`: 60% Lighthouse, then dense |" in capsys.readouterr().out
