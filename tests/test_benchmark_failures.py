"""Benchmarks on GPUs that are lent by the minute: a case that fails is written down, and the others go on."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lighthouse import LighthouseConfig
from megatron_lighthouse.launch.torchrun import ROOT

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def no_backend(*_: object) -> None:
    raise RuntimeError("no kernel image")


def test_a_dense_backend_that_fails_over_documents(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = load("documents")
    monkeypatch.setattr(documents, "dense_layers", lambda *_: {"dense fa2": no_backend})
    rows = documents.time_mix("mean 4K", [64, 128], LighthouseConfig(2, 4, 8, 8), "cpu")
    assert [(row["what"], row["direction"], row.get("failed")) for row in rows] == [
        ("lighthouse", "fwd", None),
        ("lighthouse", "fwd+bwd", None),
        ("dense fa2", "fwd", "RuntimeError: no kernel image"),
        ("dense fa2", "fwd+bwd", "RuntimeError: no kernel image"),
    ]
    timed = [{**row, "mix": mix, "ms": 2.0} for mix in (*documents.BARS, "one document") for row in rows[:2]]
    found = documents.bars(timed)
    assert (found["corpus"]["times as fast"], found["corpus"]["met"]) == (1.0, True)
    assert math.isnan(found["mean 4K"]["times as fast"])
    assert not found["mean 4K"]["met"]


def test_a_block_that_fails(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = load("flash_blocks")
    record = blocks.Record(tmp_path, 60)
    monkeypatch.setattr(blocks, "check", no_backend)
    record.check("sdpa", blocks.TINY[0], "cpu")
    assert len(record.failed) == len(blocks.CASES)
    assert {*json.loads((tmp_path / "flash_blocks.json").read_text())["checks"].values()} == {
        "failed: RuntimeError: no kernel image"
    }
    record.until = time.monotonic()
    monkeypatch.setattr(blocks, "times", no_backend)
    record.time("sdpa", blocks.TINY[0], False)
    assert (len(record.failed), len(record.left)) == (len(blocks.CASES), 1)


def test_a_wrong_block_is_said(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = load("flash_blocks")
    right = blocks.forward

    def wrong(block: Any, case: Any, rows: Any) -> Any:
        found = right(block, case, rows)
        return found if rows[0].dtype == torch.float64 else replace(found, lse=found.lse + 1)

    monkeypatch.setattr(blocks, "forward", wrong)
    with pytest.raises(ArithmeticError, match="log-sum-exp"):
        blocks.check("sdpa", blocks.TINY[0], blocks.CASES[0], torch.float32, "cpu")


@pytest.mark.slow
def test_a_case_over_ranks_that_fails(tmp_path: Path) -> None:
    """FlashAttention 4 takes no CPU: both ranks of its case end, and others take the next."""
    words = "--device cpu --cases lighthouse --lengths 32768 --inner fa4 sdpa".split()
    command = [sys.executable, str(BENCHMARKS / "rings.py"), "--out", str(tmp_path), *words]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=300)
    assert done.returncode == 1, done.stderr[-2000:]
    first, second = json.loads((tmp_path / "rings.json").read_text())["cases"]
    assert "fa4" in first["failed"]
    assert second["inner"] == "sdpa"
    assert second["repeats to the bit"]


@pytest.fixture
def two_gpus(load: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Whose runs are not trained: they say what a log would, fail, or hang, by their names."""
    script = load("two_gpus")
    says = "\n".join(f"elapsed time per iteration (ms): {1000 + i}" for i in range(10))
    codes = {"lighthouse 98304 2gpu": "raise SystemExit(2)", "dense 98304 2gpu": "import time; time.sleep(600)"}

    def words(run: Any, out: Path, tiny: bool) -> list[str]:
        return [sys.executable, "-c", codes.get(run.name, f"print({says!r})")]

    monkeypatch.setattr(script.Run, "command", words)
    monkeypatch.setattr(load("training_runs"), "LEAST", 1)
    return script


def of(script: Any, out: Path, *runs: str, within: float = 60) -> int:
    """The status of the script."""
    words = ["two_gpus.py", "--out", str(out), "--within", str(within), "--runs", *runs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            script.main()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return int(ended.value.code or 0)


def test_training_runs_go_on_without_one(two_gpus: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = ("lighthouse 32768 1gpu graphs", "lighthouse 98304 2gpu", "lighthouse 32768 2gpu", "dense 98304 2gpu")
    assert of(two_gpus, tmp_path, *runs, within=15) == 1
    rows = {row["run"]: row for row in json.loads((tmp_path / "two_gpus.json").read_text())["runs"]}
    assert {name: row["status"] for name, row in rows.items()} == dict(zip(runs, (0, 2, 0, "cut off"), strict=True))
    assert rows["lighthouse 32768 2gpu"]["efficiency"] == 0.5
    assert rows["lighthouse 32768 2gpu"]["predicted"] > 0
    assert (tmp_path / "two_gpus.png").stat().st_size > 1000
    assert "left: dense 98304 2gpu" in capsys.readouterr().out
    assert of(two_gpus, tmp_path, runs[0], runs[3], within=3) == 75
    said = capsys.readouterr().out
    assert f"'run': '{runs[0]}'" not in said  # it is not run again


def test_every_part_of_the_issue_has_a_run(load: Any) -> None:
    script = load("two_gpus")
    names = {run.name for run in script.TOGETHER}
    assert len(names) == len(script.TOGETHER)
    assert {"TP documents", "TP graphs", "graphs", ""} <= {run.how for run in script.TOGETHER}
    for run in script.TOGETHER:
        assert run.gpus == 2
        assert run.predicted > 0
    options = argparse.Namespace(end=0.0)
    with pytest.raises(SystemExit):
        load("training_runs").stop(options)


def test_another_build_that_fails(load: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is that checkout's package that runs, not this one's."""
    package = tmp_path / "megatron_lighthouse" / "__init__.py"
    package.parent.mkdir()
    package.write_text("raise RuntimeError('of the other build')\n")
    case = load("attention_cases").Case(64, 8)
    assert load("another_build").times(case, tmp_path) == {"fwd": None, "fwd+bwd": None}
    assert "RuntimeError: of the other build" in capsys.readouterr().out
