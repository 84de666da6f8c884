"""`benchmarks/graphs_cp.py` ends: a rank that fails or hangs takes the other with it. What it measures needs GPUs."""

from __future__ import annotations

import importlib
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")


def fails() -> None:
    sys.exit(3)


def hangs() -> None:
    time.sleep(600)


def ends() -> None:
    pass


@pytest.mark.parametrize(
    ("ranks", "seconds", "problem"),
    [((fails, hangs), 60, "rank 0 failed: 3"), ((ends, hangs), 3, "the time is over"), ((ends, ends), 60, None)],
)
def test_no_rank_is_left(
    ranks: Sequence[Callable[[], None]], seconds: float, problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    watched = importlib.import_module("graphs_cp").watched
    context = multiprocessing.get_context("spawn")
    processes: list[BaseProcess] = [context.Process(target=work, name=f"rank {i}") for i, work in enumerate(ranks)]
    for one in processes:
        one.start()
    began = time.monotonic()
    assert watched(processes, began + seconds) == problem
    assert not any(one.is_alive() for one in processes)
