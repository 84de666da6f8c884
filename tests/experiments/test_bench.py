"""`python -m experiments`: two short runs side by side, whose tables agree."""

from __future__ import annotations

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

from experiments import pairs, tables
from experiments.__main__ import main
from experiments.runs import BASE
from megatron_lighthouse.plots import read_scalars
from megatron_lighthouse.recipe import recovery
from tests.mcore.forks import warm
from tests.mcore.harness import ROOT
from tests.tolerances import assert_close

STEPS, SEQUENCE = 10, 256


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
    options += ["--variables-samples", "1", "--hindsight-samples", "2"]
    options += ["--corpus", str(folder / "corpus"), "--work", str(folder / "work"), "--out", str(folder / "out")]
    processes = []
    for number, run in enumerate(("dense", BASE)):
        environment = {**os.environ, **warm(), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": str(number)}
        command = [sys.executable, "-m", "experiments", "--runs", run, *options]
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
        # two lengths, five depths and two fillers, and one question of each; likewise one length, and three numbers of hops
        for probe, prefix, count in (("passkey", "", 20), ("variables", "variables_", 6)):
            cells = [row for row in bench.rows(probe) if row["run"] == run]
            assert len(cells) == count
            noise = [float(cell["log_probability"]) for cell in cells if cell["filler"] == "noise"]
            assert_close(numpy.float64(row[f"{prefix}noise_log_probability"]), numpy.mean(noise), "float64")
            questions = bench.of(f"{probe}_by_question", run, "log_probability")
            assert len(questions) == count
            assert_close(questions, [float(cell["log_probability"]) for cell in cells], "float32")
    (pair,) = bench.rows("pairs")
    assert float(pair["steady_ratio"]) > 0
    assert_close(numpy.float64(pair["difference"]), held_out[BASE] - held_out["dense"], "float64")
    assert abs(float(pair["difference"])) > 0
    assert (pair["questions"], pair["variables_questions"]) == ("20", "6")


def test_hindsight_is_of_the_checkpoint_at_the_switch(bench: Bench) -> None:
    rows = bench.rows("hindsight")
    assert {row["run"] for row in rows} == {BASE}
    assert [row["distance"] for row in rows][:3] == ["0", "1", "2"]
    assert json.loads((bench.work / BASE / "hindsight" / "evaluation.json").read_text())["iteration"] == 6


def test_remade_from_what_was_packed(bench: Bench, tmp_path: Path) -> None:
    with tarfile.open(bench.out / "work.tgz") as packed:
        assert not [name for name in packed.getnames() if "checkpoints" in name]
    assert main(["--remake", str(bench.out / "work.tgz"), "--out", str(tmp_path / "out")]) == 0
    written = sorted(file.name for file in bench.out.iterdir() if file.suffix == ".csv")
    assert {"pairs.csv", "runs.csv", "curves.csv", "passkey_by_question.csv", "variables_by_question.csv"} <= set(written)
    for name in (*written, "quality.json"):
        assert (tmp_path / "out" / name).read_bytes() == (bench.out / name).read_bytes(), name


def test_a_table_that_cannot_be_written_ends_no_run(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(pairs, "write", broken)
    with pytest.raises(OSError, match="the disk is full"):
        main(["--runs", "dense", BASE, *bench.options])
    said = capsys.readouterr().out
    assert "dense: done" in said
    assert f"{BASE}: done" in said
    assert said.count("could not be renewed: OSError: the disk is full") == 1


def test_recovery_is_what_the_report_finds_in_tensorboard(bench: Bench, tmp_path: Path) -> None:
    assert recovery.main([str(bench.work / BASE), "--smooth", "2", "--out", str(tmp_path)]) == 0
    (expected,) = tables.read_csv(tmp_path / "recovery.csv")
    found = tables.read_csv(bench.out / "runs.csv")[1]
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
    assert main(["--runs", "dense", BASE, *bench.options]) == 0
    with pytest.raises(SystemExit):
        main(["--runs", "dense", *bench.options, "--steps", "20"])
    assert "holds dense with --eval-interval 11 --train-iters 10, not --eval-interval 21" in capsys.readouterr().err


@pytest.mark.slow
def test_side_by_side_and_one_that_ends_early(bench: Bench, tmp_path: Path) -> None:
    paths = ["--corpus", str(bench.work.parent / "corpus"), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    options = [*bench.options, "--passkey-samples", "0", "--variables-samples", "0", *paths, "--at-once", "2"]
    environment = {**os.environ, **warm(), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "experiments", "--runs", "cp-2", "dense-2", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = tables.read_csv(tmp_path / "out" / "runs.csv")
    assert [(row["run"], row["iterations"], row["at_once"]) for row in found] == [("dense-2", STEPS, 2), ("cp-2", 5, 2)]
    assert [row["held_out_loss"] is None for row in found] == [False, True]
    lines = done.stdout.splitlines()
    first, second = sorted(i for i, line in enumerate(lines) if ": training, " in line)
    assert second == first + 1  # and not a run later


def test_pictures(bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--draw", str(bench.out), "--out", str(tmp_path)]) == 0
    for name in ("loss", "positions", "passkey", "variables", "cost", "hindsight"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert f"| `{BASE}`: 60% Lighthouse, then dense |" in said
    assert "| passkey | above dense | log p | variable tracking | above dense | log p | spike |" in said
