from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch import slurm
from tests.launch.machine import NVIDIA_SMI, PYTHON


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Slurm]:
    if reason := slurm.missing():
        pytest.skip(reason)
    running = slurm.Slurm(tmp_path_factory.mktemp("slurm"))
    yield running
    running.stop()


@pytest.fixture
def cluster(emulated: slurm.Slurm) -> Iterator[slurm.Slurm]:
    """What a test that fails leaves queued or running is no load for the next."""
    yield emulated
    emulated.run("scancel", "--user=root")


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder of programs: a machine of two H100s."""
    for name, text in (("python", PYTHON), ("nvidia-smi", NVIDIA_SMI)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path
