"""What ends a run on this machine: no rank stays, and a signal reaches those that save."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.launch.scripts import LAUNCH


def task_environment(folder: Path, rank: int, **more: str) -> dict[str, str]:
    """As Slurm or torchrun gives it to task.sh; more wins."""
    own = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(rank + 1), "LIGHTHOUSE_ARCH": "cpu", "TMPDIR": str(folder)}
    return {**os.environ, **own, **more}


def test_no_rank_outlives_a_killed_task(tmp_path: Path) -> None:
    command = ["bash", LAUNCH / "task.sh", "bash", "-c", "trap '' TERM; echo rank $$; sleep 1000; :"]
    with subprocess.Popen(command, env=task_environment(tmp_path, 0), stdout=subprocess.PIPE, text=True) as task:
        assert task.stdout
        rank = next(line.split()[1] for line in task.stdout if line.startswith("rank "))
        task.kill()
        task.wait()
        assert Path(f"/proc/{rank}").exists()
        task.communicate(timeout=30)  # until nobody can write any more


def test_a_rank_that_ends_well_says_nothing_of_its_watcher(tmp_path: Path) -> None:
    """Not `Killed`, which bash would report in about one of three."""
    command = ["bash", LAUNCH / "task.sh", "sleep", "0.1"]
    for _ in range(20):
        done = subprocess.run(command, env=task_environment(tmp_path, 1), capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def until(state: str, process: int) -> None:
    """The process is in this state, as the letters of ps."""
    while Path(f"/proc/{process}/stat").read_text().split(") ")[1][0] != state:
        time.sleep(0.01)


def told(rank: int, task: subprocess.Popen[str]) -> None:
    task.send_signal(signal.SIGURG)


def suspended(rank: int, task: subprocess.Popen[str]) -> None:
    until("T", rank)
    time.sleep(0.05)  # until bash has seen it
    os.kill(rank, signal.SIGCONT)


def killed(rank: int, task: subprocess.Popen[str]) -> None:
    """While task.sh is told to end, too, as where Slurm signals every process of a step."""
    until("S", task.pid)
    os.kill(rank, signal.SIGKILL)
    task.send_signal(signal.SIGURG)


@pytest.mark.parametrize(
    ("does", "happens", "statuses"),
    [
        ("trap 'exit 7' TERM; echo $$; while :; do sleep 0.01; done", told, {7}),
        ("echo $$; kill -STOP $$; exit 7", suspended, {7}),
        ("echo $$; sleep 1000; :", killed, {137, 151}),  # SIGKILL's, and where bash has lost that, SIGURG's
    ],
    ids=["told", "suspended", "killed"],
)
def test_a_task_ends_with_its_rank(
    does: str, happens: Callable[[int, subprocess.Popen[str]], None], statuses: set[int], tmp_path: Path
) -> None:
    """And with the rank's own status, though bash's `wait` ends at signals too; each time, for it is a matter of chance."""
    own = task_environment(tmp_path, 1, POSIXLY_CORRECT="1")  # some login shells export it, and Slurm passes it on

    def status(_: int) -> int:
        command = ["bash", LAUNCH / "task.sh", "bash", "-c", does]
        with subprocess.Popen(command, env=own, stdout=subprocess.PIPE, text=True) as task:
            assert task.stdout
            rank = int(task.stdout.readline())
            time.sleep(0.2)  # until task.sh waits
            happens(rank, task)
            try:
                task.communicate(timeout=20)
            except subprocess.TimeoutExpired:
                task.kill()
                raise
        return task.returncode

    with ThreadPoolExecutor(5) as several:
        assert set(several.map(status, range(20))) <= statuses


def test_a_signal_before_the_command_is_not_lost(tmp_path: Path) -> None:
    """While nvidia-smi says on which node a GPU is."""
    for name, does in (("numactl", "exit 0"), ("nvidia-smi", f"touch {tmp_path}/asked; sleep 3")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    own = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "TMPDIR": str(tmp_path),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    log = tmp_path / "log"
    with log.open("w") as out:
        task = subprocess.Popen(
            ["bash", LAUNCH / "task.sh", "echo", "trained"], env={**os.environ, **own}, stdout=out, stderr=out
        )
    while not (tmp_path / "asked").exists():
        assert task.poll() is None
        time.sleep(0.05)
    task.send_signal(signal.SIGURG)
    assert task.wait(30) == 143
    assert "trained" not in log.read_text()


# what bash reads first: a signal to itself just when it has started a process, and before it knows its number
AT_THE_START = """set -o functrace
trap '[[ $BASH_COMMAND != "{command}"* ]] || {{ sleep 0.5; kill -{signal} $$; }}' DEBUG
"""


def test_a_signal_while_the_command_starts_reaches_it(tmp_path: Path) -> None:
    (tmp_path / "first").write_text(AT_THE_START.format(command="child=", signal="URG"))
    own = task_environment(tmp_path, 1, BASH_ENV=str(tmp_path / "first"))
    command = ["bash", LAUNCH / "task.sh", "bash", "-c", "trap 'echo saved; exit 7' TERM; while :; do sleep 0.1; done"]
    done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (7, "saved\nlaunch: rank 1 ended with status 7\n")


STOPPED = """#!/usr/bin/env bash
# in the place of Python: torchrun, whose rank saves when it is told to by the signal of task.sh
[[ $2 == torch.distributed.run ]] || exit 0
bash -c 'trap "echo saved; exit 5" URG; echo ready; while :; do sleep 0.1; done' &
rank=$!
trap 'echo torchrun is told; exit 1' TERM
while kill -0 $rank; do wait $rank; status=$?; done
exit $status
"""


def local(folder: Path, *options: str, **variables: str) -> subprocess.Popen[str]:
    """local.sh under way, with that in the place of Python."""
    (folder / "python").write_text(STOPPED)
    (folder / "python").chmod(0o755)
    own = {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": str(folder / "python"), **variables}
    command = [str(LAUNCH / "local.sh"), "--cluster", "cpu-test", "--recipe", "530m-98k", "--run", f"{folder}/run"]
    command += [*options, "--gpus", "1", "--", "--mock-data"]
    return subprocess.Popen(command, env={**os.environ, **own}, stdout=subprocess.PIPE, text=True)


def test_a_signal_while_local_starts_ranks_reaches_them(tmp_path: Path) -> None:
    (tmp_path / "first").write_text(AT_THE_START.format(command="set +m", signal="TERM"))
    with local(tmp_path, BASH_ENV=str(tmp_path / "first")) as script:
        printed, _ = script.communicate(timeout=30)
    assert script.returncode == 5
    assert "saved" in printed


@pytest.mark.parametrize("study", [(), ("--study", "CP=1 SEQ=98304 ATTENTION=dense:lighthouse")], ids=["run", "study"])
def test_sigterm_ends_a_run_or_a_study(study: tuple[str, ...], tmp_path: Path) -> None:
    with local(tmp_path, *study) as script:
        assert script.stdout
        while "ready" not in script.stdout.readline():
            assert script.poll() is None
        script.terminate()
        rest = script.stdout.read()
    assert "saved" in rest
    assert "torchrun is told" not in rest
    assert "lighthouse" not in rest
    assert script.returncode == (143 if study else 5)
    assert len(list((tmp_path / "run").glob("**/local.log"))) == 1
