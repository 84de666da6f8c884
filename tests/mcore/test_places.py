"""Folders that cannot be made, and checkpoints that are none: refused before a run begins, and never queued again."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from megatron_lighthouse.mcore.command_line import kept, places
from megatron_lighthouse.mcore.command_line.run_options import missing_packages
from tests.mcore.harness import refused
from tests.mcore.test_checks import plain_run

NONE = {flag[2:].replace("-", "_"): None for flag in (*kept.FOLDERS, "--load", "--pretrained-checkpoint")}


def problems(**given: str) -> list[str]:
    return [*places.problems(Namespace(**{**NONE, **given}), Path)]


@pytest.mark.parametrize("flag", kept.FOLDERS)
def test_a_file_in_the_way_of_a_folder(flag: str, tmp_path: Path) -> None:
    name = flag[2:].replace("-", "_")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    for good in ("folder", "folder/new/newer", "new"):
        assert not problems(**{name: str(tmp_path / good)})
    assert not problems(**{name: "msc://bucket/file"})
    ways = {"file": "it is", "link": "it is", "file/run": f"{tmp_path}/file is", "link/a/b": f"{tmp_path}/link is"}
    for bad, way in ways.items():
        given = f"{tmp_path}/{bad}"
        assert problems(**{name: given}) == [f"{flag} {given} cannot be made: {way} no folder: name another."]


def test_a_folder_that_is_not_shown_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden(self: Path, **how: bool) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "stat", hidden)
    assert not problems(save="/of/somebody/else")


def test_a_first_checkpoint_is_one(tmp_path: Path) -> None:
    """Megatron looks for it when ranks and memory are taken, and only where the run has none of its own."""
    first, own = tmp_path / "first", tmp_path / "own"
    assert "is not there" in problems(pretrained_checkpoint=str(first))[0]
    (first / "iter_0000005").mkdir(parents=True)
    own.mkdir()
    (found,) = problems(pretrained_checkpoint=str(first), load=str(own))
    assert found.startswith(f"--pretrained-checkpoint {first} has no latest_checkpointed_iteration.txt: give the folder")
    (own / "latest_checkpointed_iteration.txt").write_text("3")
    assert not problems(pretrained_checkpoint=str(first), load=str(own))
    (first / "latest_checkpointed_iteration.txt").write_text("release")
    assert not problems(pretrained_checkpoint=str(first))


def test_a_run_is_refused_with_all_of_them(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = ["--pretrained-checkpoint", str(tmp_path), "--save", str(tmp_path / "file"), "--save-interval", "2"]
    log = refused(tmp_path / "run", "--attention", "dense", *words)
    assert f"--save {tmp_path / 'file'} cannot be made" in log
    assert f"--pretrained-checkpoint {tmp_path} has no latest_checkpointed_iteration.txt" in log


def test_a_log_that_needs_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    given = plain_run(hybrid_layer_pattern=None, wandb_project="study")
    monkeypatch.setattr("megatron_lighthouse.mcore.command_line.run_options.find_spec", lambda name: None)
    assert any(line.startswith("--wandb-project study needs the package wandb") for line in missing_packages(given))
