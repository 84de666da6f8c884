"""benchmarks/scaling.sh on stand-ins for a machine: which points it tries, and what its status says."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.scripts import LAUNCH
from tests.mcore.forks import warm

STAND_IN = """#!/bin/sh
case "$*" in
*device_count*) echo $GPUS ;;
*scaling_points.py*)
    known=$ANSWERS/$(echo "$*" | tr '/ ' '__')
    [ -e "$known" ] || {{ {python} "$@" >"$known.$$" && mv "$known.$$" "$known"; }} || exit
    cat "$known"
    ;;
*context_parallel.py*) echo "$LIGHTHOUSE_COPY_ENGINE: $*" >>"$NOTES"; [ ! -e "$BROKEN" ] ;;
*launch.check*) exit 1 ;;
esac
"""
"""A Python whose machine has GPUS, and whose points all fail; asked for the same points again it knows them."""


@pytest.fixture(scope="module", autouse=True)
def answers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANSWERS", str(tmp_path_factory.mktemp("points")))
        yield


def study(machine: Path, part: str, gpus: int, *more: str) -> subprocess.CompletedProcess[str]:
    (machine / "python").write_text(STAND_IN.format(python=sys.executable))
    own = {"PATH": f"{machine}:{os.environ['PATH']}", "PYTHON": str(machine / "python"), "GPUS": str(gpus)}
    own |= {"NOTES": str(machine / "notes"), "BROKEN": str(machine / "broken")}
    own |= warm()
    command = ["bash", LAUNCH.parent / "benchmarks" / "scaling.sh", "--out", machine / "out", "--work", machine / "work"]
    return subprocess.run([*command, "--part", part, *more], env={**os.environ, **own}, capture_output=True, text=True)


def test_a_failed_point_is_the_status_of_the_scaling_study(machine: Path) -> None:
    done = study(machine, "one", 2)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.count(f"{machine}/work/study-CP=1 ") == 6
    assert (machine / "out" / "scaling.tgz").exists()


def test_the_study_of_four_gpus_tries_each_point_on_its_own(machine: Path) -> None:
    done = study(machine, "4", 4)
    assert done.returncode == 1, done.stdout + done.stderr
    found = {ranks: done.stderr.count(f"-CP={ranks} ") for ranks in (1, 2, 4)}
    assert found == {1: 5, 2: 3 + 2 + 1, 4: 4 + 4 + 3}
    attention = [line.split() for line in (machine / "notes").read_text().splitlines()]
    assert [(words[0], words[3]) for words in attention] == [(":", "4"), (":", "2")]
    order = [line.split(":")[0] for line in done.stdout.splitlines() if ": status " in line]
    assert order[0] == "attention on 4"
    assert order.index("1m") > order.index("study")
    assert order.index("tp2") > order.index("1m")


def test_a_stage_of_the_study_alone(machine: Path) -> None:
    """What a machine that was taken away left for the next one."""
    done = study(machine, "2", 2, "--stage", "late")
    order = [line.split(":")[0] for line in done.stdout.splitlines() if ": status " in line]
    assert order == ["agreement", "tp2", "pp2", "all_gather", "a2a", "study"]
    assert not (machine / "notes").exists()  # of attention
    done = study(machine, "2", 2, "--stage", "million")
    order = [line.split(":")[0] for line in done.stdout.splitlines() if ": status " in line]
    assert order == ["1m-all-layers", "1m-one-dense", "1m", "1m"]
    refused = study(machine, "all", 2, "--stage", "late")
    assert (refused.returncode, refused.stderr) == (2, "--stage is study, million or late, and of --part 2, 4 or 8.\n")


def test_attention_that_fails_is_timed_over_nccl(machine: Path) -> None:
    (machine / "broken").touch()
    done = study(machine, "4", 4)
    lines = (machine / "notes").read_text().splitlines()
    assert ["--part time --quick" in line for line in lines] == [False, True, False, True]
    assert [line.split()[0] for line in lines if "--quick" in line] == ["0:"] * 2
    assert f"attention on 4: {machine}/work/attention-4.log" in done.stderr


def test_the_study_needs_its_gpus(machine: Path) -> None:
    done = study(machine, "8", 4)
    assert done.returncode == 2
    assert "--part 8 takes 8 GPUs, and 4 can be seen" in done.stderr
    done = study(machine, "all", 1)
    assert (done.returncode, done.stderr) == (2, "--part all takes 2 GPUs, and 1 can be seen.\n")
