"""A loss, a gradient or a weight that is not finite: no step, no checkpoint, one status on all ranks, and where to go on."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load

from megatron_lighthouse.mcore.loop.finite import NOT_FINITE
from tests.mcore.harness import MODEL, TEXT, Processes, run, some_slow
from tests.tolerances import assert_close

Poisoned = Callable[..., str]


@pytest.fixture
def poisoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Poisoned:
    """The log of a run that must end with NOT_FINITE on every rank: of what, from which iteration on, by which rank."""

    def start(poison: str, *arguments: str, ranks: int = 1) -> str:
        monkeypatch.setenv("POISON", poison)
        options = [*MODEL, "--attention", "lighthouse", *saves(tmp_path), *arguments, *TEXT]
        processes = Processes(tmp_path / "run", ranks, options, module="tests.mcore.poison")
        end = time.monotonic() + 120
        while any(process.poll() is None for process in processes.processes) and time.monotonic() < end:
            time.sleep(0.05)
        statuses, log = processes.wait(), processes.log.read_text(errors="replace")
        assert statuses == [NOT_FINITE] * ranks, log[-5000:]
        return log

    return start


def saves(folder: Path) -> list[str]:
    return [*("--save", str(folder / "checkpoint"), "--load", str(folder / "checkpoint")), "--save-interval", "1000"]


def saved(folder: Path) -> int | None:
    """The iteration that the tracker names, whose weights must be finite."""
    tracker = folder / "checkpoint" / "latest_checkpointed_iteration.txt"
    if not tracker.exists():
        return None
    reader = FileSystemReader(tracker.parent / f"iter_{int(tracker.read_text()):07}")
    found = reader.read_metadata().state_dict_metadata
    weights = {
        name: torch.full(tuple(entry.size), torch.nan)
        for name, entry in found.items()
        if name.endswith(".weight") and not name.startswith("optimizer") and hasattr(entry, "size")
    }
    assert weights
    load(weights, storage_reader=reader)
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    return int(tracker.read_text())


FIRST = {
    "loss": ("loss nan 1 0", ""),
    "infinite loss": ("loss inf 1 0", ""),
    "gradient": ("gradient nan 1 0", ""),
    "infinite gradient": ("gradient inf 1 0", ""),
    "without reruns": ("gradient nan 1 0", "--rerun-mode disabled"),
}


@pytest.mark.parametrize("case", some_slow(FIRST, {"infinite loss", "infinite gradient"}))
def test_a_first_iteration_is_checked(case: str, tmp_path: Path, poisoned: Poisoned) -> None:
    poison, options = FIRST[case]
    log = poisoned(poison, *options.split())
    assert "the loss or a gradient of iteration 1 is not finite, and its step is not taken: there is no checkpoint" in log
    assert saved(tmp_path) is None


CONTEXT, DATA = "--context-parallel-size 2", "--use-distributed-optimizer --rerun-mode disabled"


@pytest.mark.parametrize("options", some_slow([CONTEXT, DATA], {DATA}))
def test_of_one_rank_ends_all_and_keeps_what_was_trained(options: str, tmp_path: Path, poisoned: Poisoned) -> None:
    log = poisoned("loss nan 3 1", *options.split(), ranks=2)
    assert f"the weights before it are saved as iteration 2 in {tmp_path / 'checkpoint'}, the last good checkpoint" in log
    assert saved(tmp_path) == 2
    again = poisoned("loss nan 3 1", *options.split(), "--no-load-optim", ranks=2)  # the same iteration, on the same machine
    assert f"the last good checkpoint is iteration 2 in {tmp_path / 'checkpoint'}" in again
    assert saved(tmp_path) == 2


def test_a_run_goes_on_from_what_was_saved(tmp_path: Path, poisoned: Poisoned) -> None:
    """As if nothing had been: from plain weights, and with the same data."""
    whole = run(tmp_path / "whole", "--attention", "lighthouse", "--train-iters", "4").losses
    poisoned("gradient nan 3 0", "--train-iters", "4")
    losses = run(tmp_path / "on", "--attention", "lighthouse", "--train-iters", "4", *saves(tmp_path)).losses
    assert list(losses) == [3, 4]
    assert_close(list(losses.values()), [whole[3], whole[4]], "parallel loss")


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, poisoned: Poisoned) -> None:
    """Whatever is checked before; the rank that has them is one of two."""
    unchecked = "--no-check-for-nan-in-loss-and-grad --save-interval 1 --pipeline-model-parallel-size 2".split()
    log = poisoned("weight inf 2 1", *unchecked, ranks=2)
    assert "weights of iteration 2 are not finite, and are not saved: the last good checkpoint is iteration 1 in" in log
    assert saved(tmp_path) == 1


def test_a_checkpoint_that_is_not_finite_is_named(tmp_path: Path, poisoned: Poisoned, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of an older release, or of Megatron's own script; nothing that follows it is saved either."""
    monkeypatch.setenv("POISON_SAVED", "1")
    poisoned("weight nan 2 0", "--save-interval", "1")
    monkeypatch.delenv("POISON_SAVED")
    log = poisoned("loss 1 1 0", "--save-interval", "1")
    loaded = f"so they were loaded from {tmp_path / 'checkpoint'}; start from an earlier one by --ckpt-step: 1."
    assert f"weights of iteration 2 are not finite, and are not saved: {loaded}" in log
    assert not (tmp_path / "checkpoint" / "iter_0000003").exists()
