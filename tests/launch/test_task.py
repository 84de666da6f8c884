"""task.sh, one rank: its NUMA node, its profiler and its caches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_lighthouse.launch import dlprof
from tests.launch.scripts import LAUNCH


@pytest.mark.skipif(not Path("/sys/bus/pci/devices").is_dir(), reason="a kernel without PCI devices")
@pytest.mark.parametrize(
    ("switch", "allowed", "rank", "says"),
    [
        ("1", True, 0, "NUMA node 1"),
        ("1", False, 0, "rank 0: no NUMA binding: numactl may not bind to node 1"),
        ("1", False, 3, "rank 3: no NUMA binding: numactl may not bind to node 1"),
        ("0", True, 0, "no NUMA binding: NUMA=0 in the cluster file"),
    ],
)
def test_a_rank_that_cannot_be_bound_runs_unbound(switch: str, allowed: bool, rank: int, says: str, machine: Path) -> None:
    (machine / "numa_node").write_text("1")
    for name, text in (
        ("nvidia-smi", f"echo 0000/../../../..{machine}"),  # a device whose node is in our file
        ("numactl", f'{"" if allowed else "exit 1"}\nshift 2\nBOUND=1 exec "$@"'),
    ):
        (machine / name).write_text(f"#!/bin/sh\n{text}\n")
        (machine / name).chmod(0o755)
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "4", "LIGHTHOUSE_NUMA": switch, "TMPDIR": str(machine)}
    environment = {**os.environ, **own, "PATH": f"{machine}:{os.environ['PATH']}"}
    command = ["bash", LAUNCH / "task.sh", "bash", "-c", 'echo "bound ${BOUND:-0}"']
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert f"launch: {says}\n" in done.stdout
    assert f"bound {int(allowed and switch == '1')}\n" in done.stdout


@pytest.mark.parametrize("kind", ["nsys", "dlprof"])
def test_the_chosen_ranks_are_wrapped(kind: str, machine: Path) -> None:
    (machine / kind).write_text('#!/bin/sh\necho "$RANK $*" >>"$NOTED"\n')
    (machine / kind).chmod(0o755)
    chosen = {"LIGHTHOUSE_PROFILER": kind, "LIGHTHOUSE_PROFILER_RANKS": "1 3", "LIGHTHOUSE_PROFILER_FOLDER": "/traces"}
    own = {
        "PATH": f"{machine}:{os.environ['PATH']}",
        "NOTED": f"{machine}/noted",
        "LIGHTHOUSE_ARCH": "cpu",
        "TMPDIR": str(machine),
    }
    for rank in range(4):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "4"}
        subprocess.run(
            ["bash", LAUNCH / "task.sh", "true", "and", "more"], env={**os.environ, **chosen, **own, **ranks}, check=True
        )
    noted = (machine / "noted").read_text().splitlines()
    assert [line[0] for line in noted] == ["1", "3"]
    options = {
        "nsys": "profile --capture-range=cudaProfilerApi --capture-range-end=stop",
        "dlprof": "--mode=pytorch --force=true",
    }
    assert noted[0].startswith(f"1 {options[kind]} ")
    assert noted[0].endswith("_1 true and more")


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"TMPDIR": "{machine}"}, "{machine}"),
        ({"TMPDIR": "/proc/nowhere"}, "/tmp"),
        ({"TMPDIR": "/proc/nowhere", "SLURM_PROCID": "0", "SLURM_TMPDIR": "{machine}"}, "{machine}"),
    ],
)
def test_caches_lie_on_the_node(variables: dict[str, str], folder: str, machine: Path) -> None:
    own = {name: value.format(machine=machine) for name, value in variables.items()}
    own |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LIGHTHOUSE_ARCH": "cpu"}
    environment = {name: value for name, value in os.environ.items() if "CACHE_DIR" not in name}
    command = ["bash", LAUNCH / "task.sh", "true"]
    done = subprocess.run(command, env={**environment, **own}, capture_output=True, text=True, check=True)
    assert f" TRITON_CACHE_DIR={folder.format(machine=machine)}/megatron_lighthouse-{os.getuid()}/triton\n" in done.stdout


def test_dlprof_is_started_on_the_chosen_ranks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    module = SimpleNamespace(init=lambda: calls.append(os.environ["RANK"]))
    monkeypatch.setitem(sys.modules, "nvidia_dlprof_pytorch_nvtx", module)
    monkeypatch.setenv("LIGHTHOUSE_PROFILER_RANKS", "1")
    for profiler in ("nsys", "dlprof"):
        monkeypatch.setenv("LIGHTHOUSE_PROFILER", profiler)
        for rank in "01":
            monkeypatch.setenv("RANK", rank)
            dlprof.start()
    assert calls == ["1"]
