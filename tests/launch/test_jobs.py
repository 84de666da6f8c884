"""Which jobs may be queued beside each other, when one has nothing left to do, and the check of its nodes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lighthouse.launch import preflight
from megatron_lighthouse.launch.preflight import Report, findings
from tests.launch.scripts import ROOT, common, submit


def test_two_jobs_do_not_train_into_one_run(tmp_path: Path) -> None:
    ours = ["--cluster", "cpu-test", "--recipe", "cpu-test", "--check", "0"]
    data = ["--", "--mock-data"]
    assert submit(tmp_path, *ours, *data).returncode == 0
    assert (tmp_path / "run" / "logs" / "train.jobs").read_text() == "7\n"
    done = submit(tmp_path, *ours, "--sbatch", "--dependency=afterok:77", *data, known="3\n7\n")
    assert (done.returncode, done.stdout) == (2, "")
    assert "job 7 (train) is queued or runs. Nothing was queued: scancel 7, wait" in done.stderr
    assert len((tmp_path / "queued").read_text().splitlines()) == 2
    for allowed in (["--sbatch", "--dependency=afterok:5:7"], ["--as", "evaluation"]):
        assert submit(tmp_path, *ours, *allowed, *data, known="7\n").returncode == 0
    assert submit(tmp_path, *ours, *data, known="").returncode == 0


def test_no_stage_is_queued_unless_all_can_be(tmp_path: Path) -> None:
    ours = ["--cluster", "cpu-test", "--recipe", "cpu-test", "--stage1", "6", "--total", "10", "--eval-iters", "4"]
    ours += ["--check", "0", "--", "--mock-data"]
    done = submit(tmp_path, *ours, script="two_stage.sh")
    assert done.returncode == 2
    assert "stage 2, to iteration 10 was not queued. Queued are jobs 7: scancel 7" in done.stderr
    calls = [line.startswith("--test-only ") for line in (tmp_path / "queued").read_text().splitlines()]
    assert calls == [True, True, True, True, False, True, False]
    (tmp_path / "queued").unlink()
    # not even to wait for it: from where that job ends, stage 1 would go on
    waits = ["--sbatch", "--dependency=afterok:7", *ours]
    done = submit(tmp_path, *waits, script="two_stage.sh", known="7\n")
    assert (done.returncode, done.stdout) == (2, "")
    assert "its job 7 (train) is queued or runs. Nothing was queued: scancel 7, or wait" in done.stderr
    assert not (tmp_path / "queued").exists()


def test_an_exit_interval_is_reached_beyond_where_the_job_began(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("10")
    script = 'ARGUMENTS=(--train-iters "$1" --exit-interval 10) AS=train FIRST=$2; finished && echo yes || echo no'
    for last, began, says in (("40", "0", "yes"), ("40", "10", "no"), ("10", "10", "yes")):
        assert common(script, last, began, RUN=str(tmp_path)) == f"{says}\n"


def test_a_node_that_meets_nobody_names_the_first(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    own = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "LIGHTHOUSE_NODES": "node1 node2"}
    for name, value in {**own, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert preflight.main(["--gpus-per-node", "1", "--arch", "cpu", "--seconds", "0.5"]) == preflight.UNMET
    assert "preflight: node2: cannot reach node1, port 1: " in capsys.readouterr().err


def test_a_node_that_cannot_import_what_a_run_needs_is_bad() -> None:
    node = preflight.report(["json", "no_such_module"])
    (line,) = (line for line in findings([node], node.gpus or 0, "cpu") if "import" in line)
    assert line.startswith(f"{node.host}: no_such_module cannot be imported by ")


def test_a_bad_node_is_named() -> None:
    good = {"torch": "2.14", "driver": "580.1"}
    reports = [
        Report("node1", 8, good, []),
        Report("node2", 7, good, []),
        Report("node3", 8, {"torch": "2.14", "driver": "570.9"}, ["GPU 5: 2 uncorrected ECC errors"]),
    ]
    assert list(findings(reports, 8, "hopper")) == [
        "node2: 7 GPUs, and the cluster file says GPUS_PER_NODE=8",
        "node3: GPU 5: 2 uncorrected ECC errors",
        "node3: driver 570.9, and 2 of 3 nodes have 580.1",
    ]
    assert list(findings(reports[:2], 8, "cpu")) == []


HANGS = """
import sys, time
from datetime import timedelta
from torch.distributed import DistError, TCPStore
from megatron_lighthouse.launch.preflight import all_reduce, at_most
try:
    all_reduce(TCPStore("127.0.0.1", 0, None, True, timedelta(hours=1)), 0, 2, timedelta(seconds=0.5))
except (DistError, RuntimeError):
    print("no second node", flush=True)
with at_most(0.5):
    time.sleep(3600)
"""


def test_the_all_reduce_ends_though_another_node_does_not_come() -> None:
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.returncode, done.stdout) == (1, "no second node\n"), done.stderr
    assert "the all-reduce took over" in done.stderr
