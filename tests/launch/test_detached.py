"""benchmarks/detached.sh: a command goes on without the one that started it, and what it left comes back."""

from __future__ import annotations

import os
import signal
import subprocess
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "detached.sh"


def detached(*arguments: str | Path) -> str:
    done = subprocess.run(["bash", SCRIPT, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_command_outlives_its_start(tmp_path: Path) -> None:
    go = tmp_path / "go"
    waits = f"until [ -e {go} ]; do sleep 0.1; done; pwd; echo 1 > {tmp_path}/out/table.csv; exit 3"
    detached("start", tmp_path, "bash", "-c", waits)
    assert "goes on" in detached("look", tmp_path, "0", tmp_path / "first")
    again = subprocess.run(["bash", SCRIPT, "start", tmp_path, "true"], capture_output=True, text=True)
    assert (again.returncode, "has a command that goes on" in again.stderr) == (2, True)
    go.touch()
    said = detached("look", tmp_path, "60", tmp_path / "second")
    assert f"{tmp_path}/repo\nended with status 3\n" in said
    assert (tmp_path / "repo" / "benchmarks" / "detached.sh").exists()
    with tarfile.open(tmp_path / "second" / "out.tgz") as packed:
        assert {"log", "out/table.csv"} <= set(packed.getnames())


def test_a_killed_command_may_begin_again(tmp_path: Path) -> None:
    detached("start", tmp_path, "sleep", "1000")
    os.killpg(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    assert "was killed: start may begin it again" in detached("look", tmp_path, "10", tmp_path / "first")
    detached("start", tmp_path, "true")
    assert "ended with status 0" in detached("look", tmp_path, "10", tmp_path / "second")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("start", "here"), "benchmarks/detached.sh start FOLDER COMMAND"),
        (("start", str(SCRIPT.parent / "away"), "true"), "is in the checkout, which is copied there: give a folder outside"),
        (("look", "/nowhere", "1", "/nowhere/out"), "/nowhere has no log: start a command there first."),
    ],
)
def test_what_cannot_be_is_refused(arguments: tuple[str, ...], says: str, tmp_path: Path) -> None:
    done = subprocess.run(["bash", SCRIPT, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert not list(tmp_path.iterdir())


def test_it_explains_itself() -> None:
    done = subprocess.run(["bash", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 2
    assert "benchmarks/detached.sh start FOLDER COMMAND" in done.stderr
