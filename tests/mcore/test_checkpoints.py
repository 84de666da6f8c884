"""Checkpoints pass between Lighthouse and dense, across layouts, and survive a kill in the middle of a save."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from torch.distributed.checkpoint import FileSystemReader

from tests.mcore.harness import MODEL, TEXT, Processes, Run, run
from tests.tolerances import assert_close

ATTENTIONS = ("lighthouse", "dense")
OTHER = {"lighthouse": "dense", "dense": "lighthouse"}


def keys(checkpoint: Path, iteration: int) -> set[str]:
    """All weights and all optimizer state that a checkpoint holds, of whatever layout."""
    found = FileSystemReader(checkpoint / f"iter_{iteration:07}").read_metadata().state_dict_metadata
    # one of each per rank, with the rank in the name
    return {key for key in found if not key.startswith(("rng_state/", "rerun_state_machine_state/"))}


def save_interval(folder: Path, every: int) -> list[str]:
    return ["--save", str(folder), "--save-interval", str(every)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Per attention, a checkpoint after two of four iterations."""
    folder = tmp_path_factory.mktemp("saved")
    for attention in ATTENTIONS:
        four = ["--attention", attention, "--train-iters", "4", "--exit-interval", "2"]
        run(folder / attention, *four, *save_interval(folder / attention / "checkpoint", 2))
    return {attention: folder / attention / "checkpoint" for attention in ATTENTIONS}


def resume(folder: Path, checkpoint: Path, attention: str, *layout: str, ranks: int = 1) -> Run:
    """Iterations 3 and 4, weights and optimizer from the checkpoint."""
    options = ["--attention", attention, "--train-iters", "4", "--load", str(checkpoint), *layout]
    return run(folder, *options, ranks=ranks)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory, saved: dict[str, Path]) -> dict[str, Run]:
    """Per attention, one process that resumes the *other* attention's checkpoint."""
    folder = tmp_path_factory.mktemp("resumed")
    return {attention: resume(folder / attention, saved[OTHER[attention]], attention) for attention in ATTENTIONS}


def test_both_attentions_save_the_same_keys(saved: dict[str, Path]) -> None:
    dense = keys(saved["dense"], 2)
    assert any("self_attention" in key for key in dense)
    assert keys(saved["lighthouse"], 2) == dense


TENSOR, PIPELINE = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"


@pytest.mark.parametrize(
    ("attention", "layout"),
    [
        *(("lighthouse", TENSOR), ("dense", PIPELINE)),
        *(pytest.param(*both, marks=pytest.mark.slow) for both in (("lighthouse", PIPELINE), ("dense", TENSOR))),
    ],
)
def test_the_other_attention_resumes_at_another_layout(
    attention: str, layout: str, tmp_path: Path, saved: dict[str, Path], resumed: dict[str, Run]
) -> None:
    source, target = saved[OTHER[attention]], tmp_path / "checkpoint"
    losses = resume(tmp_path, source, attention, *layout.split(), *save_interval(target, 4), ranks=2).losses
    assert list(losses) == [3, 4]
    assert_close(list(losses.values()), list(resumed[attention].losses.values()), "parallel loss")
    assert keys(target, 4) == keys(source, 2), "something is missing, or unexpected"


def test_resuming_equals_never_stopping(tmp_path: Path, saved: dict[str, Path]) -> None:
    whole = run(tmp_path / "whole", "--attention", "lighthouse", "--train-iters", "4").losses
    rest = resume(tmp_path / "rest", saved["lighthouse"], "lighthouse").losses
    assert rest == {i: whole[i] for i in (3, 4)}


def test_killed_in_the_middle_of_a_save(tmp_path: Path) -> None:
    """The next start takes the last whole checkpoint, and passes the iteration whose save was cut off."""
    checkpoint = tmp_path / "checkpoint"
    options = ["--attention", "lighthouse", "--train-iters", "6", *save_interval(checkpoint, 2), "--load", str(checkpoint)]
    arguments = [*MODEL, *options, "--data-cache-path", str(tmp_path / "data"), *TEXT]
    cut_off = checkpoint / "iter_0000004"
    victim = Processes(tmp_path / "victim", 1, arguments)
    end = time.monotonic() + 120
    while not cut_off.exists() and time.monotonic() < end:
        time.sleep(0.0005)
    victim.kill()
    assert cut_off.exists(), victim.log.read_text()[-3000:]
    assert not (cut_off / "metadata.json").exists(), "the kill came after the save: it must come within"
    tracker = checkpoint / "latest_checkpointed_iteration.txt"
    assert tracker.read_text() == "2"
    losses = run(tmp_path / "next", *options).losses
    assert list(losses) == [3, 4, 5, 6]
    assert tracker.read_text() == "6"
    assert (cut_off / "metadata.json").exists()
