from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.launch import slurm


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
