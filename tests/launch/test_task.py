"""What becomes of a rank's exit status: what its task says of it, and whether the job is queued again."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"

SRUN = """#!/bin/sh
for word; do case $word in --output=*) log=${word#*=} ;; esac; done
echo "launch: rank 1 ended with status $STATUS: why" >>"$log"
exit 1
"""
"""A step whose rank ended with STATUS, and that ends as srun does for another rank, which it killed."""
SCONTROL = """#!/bin/sh
case $1 in
show) echo node1 ;;
requeue) kill -KILL "$PPID" ;;
esac
"""
"""As in Slurm, a job that is queued again is ended."""


@pytest.mark.parametrize(("status", "says"), [(2, "its command line is refused"), (16, "what is not finite would be so again")])
def test_a_task_says_what_another_start_would_repeat(status: int, says: str, tmp_path: Path) -> None:
    own = {"RANK": "3", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "TMPDIR": str(tmp_path), "LIGHTHOUSE_ARCH": "cpu"}
    command = ["bash", str(LAUNCH / "task.sh"), "bash", "-c", f"exit {status}"]
    done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True)
    assert done.returncode == status
    assert f"launch: rank 3 ended with status {status}: {says}\n" in done.stdout


@pytest.mark.parametrize(("status", "again"), [(1, True), (17, True), (2, False), (16, False)])
def test_a_job_is_not_queued_for_what_would_be_so_again(status: int, again: bool, tmp_path: Path) -> None:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    cluster = tmp_path / "cluster.env"
    cluster.write_text((LAUNCH / "clusters" / "cpu-test.env").read_text() + "PREFLIGHT=0\n")
    job = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "node1",
        "SLURM_SUBMIT_DIR": str(LAUNCH.parent),
    }
    own = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "STATUS": str(status), "LIGHTHOUSE_LAUNCH": str(LAUNCH)}
    command = ["bash", str(LAUNCH / "pretrain.sbatch"), "--cluster", str(cluster), "--recipe", "cpu-test"]
    command += ["--run", str(tmp_path / "run"), "--", "--mock-data"]
    done = subprocess.run(command, env={**os.environ, **job, **own}, capture_output=True, text=True, timeout=60)
    queued = (tmp_path / "run" / "logs" / "7.requeues").exists()
    assert queued is again, done.stdout + done.stderr
    assert again or done.returncode == status
