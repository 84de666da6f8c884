"""The recipe behind `make train`: two stages, pictures, and going on where it stopped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.utils.tensorboard import SummaryWriter

from megatron_lighthouse.mcore.loop import progress
from megatron_lighthouse.mcore.loop.progress import last_iteration
from megatron_lighthouse.plots import read_scalars
from megatron_lighthouse.recipe import two_stage
from megatron_lighthouse.recipe.presets import default_text, preset_for
from tests.mcore.harness import ROOT


def recipe(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_lighthouse.recipe.two_stage", "--runs", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_both_stages_and_again(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("the GPU preset takes minutes; benchmarks/h100_training.py runs it")
    short = ["--name", "short", "--steps", "2", "--dense-steps", "1", "--data", str(ROOT / "LICENSE")]
    first = recipe(tmp_path, *short, "--seq-length", "1024", "--eval-iters", "1")
    assert first.returncode == 0, first.stdout + first.stderr
    run = tmp_path / "short"
    assert list(read_scalars(run / "tensorboard" / "lighthouse")["lm loss"][0]) == [1, 2]
    assert list(read_scalars(run / "tensorboard" / "dense")["lm loss"][0]) == [3]
    for picture in ("loss.png", "selection.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")
    assert "tokens/s=" in first.stdout
    again = recipe(tmp_path, *short)
    assert again.returncode == 0
    assert again.stdout.count("is reached already") == 2


def test_an_attention_that_never_becomes_dense_has_one_stage(tmp_path: Path) -> None:
    short = ["--name", "one", "--steps", "1", "--dense-steps", "1", "--data", str(ROOT / "LICENSE"), "--attention", "parallax"]
    done = recipe(tmp_path, *short, "--seq-length", "1024", "--eval-iters", "1", "--parallax-telemetry-interval", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 iterations with Parallax, on 2 CPU processes" in done.stdout
    scalars = read_scalars(tmp_path / "one" / "tensorboard" / "parallax")
    assert list(scalars["lm loss"][0]) == [1, 2]
    assert list(scalars["parallax/correction/layer-4"][0]) == [2]
    assert not (tmp_path / "one" / "tensorboard" / "dense").exists()
    assert "selection.png" not in done.stdout


def test_a_stage_without_a_logged_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As --tensorboard-log-interval leaves a stage that is shorter."""
    checkpoints, logs = tmp_path / "short" / "checkpoints", tmp_path / "short" / "tensorboard"
    checkpoints.mkdir(parents=True)
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("3")
    for attention in ("lighthouse", "dense"):
        with SummaryWriter(str(logs / attention)) as log:
            log.add_text("seq_length", "64")
            if attention == "lighthouse":
                log.add_scalar("lm loss", 2.5, 2)
    assert two_stage.main(["--runs", str(tmp_path), "--name", "short", "--steps", "2", "--dense-steps", "1"]) == 0
    printed = capsys.readouterr().out
    assert "lighthouse: loss 2.500 at iteration 2" in printed
    assert "dense: loss" not in printed
    assert (tmp_path / "short" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_failed_run_shows_why(tmp_path: Path) -> None:
    result = recipe(tmp_path, "--data", str(ROOT / "LICENSE"), "--lighthouse-budget", "40")
    assert result.returncode != 0
    assert "--lighthouse-budget 40 must be a positive multiple of --lighthouse-tile-budget 16: use 32 or 48" in result.stderr
    assert "lighthouse.log" in result.stderr


@pytest.mark.parametrize(("gpus", "processes", "context_parallel"), [(0, 2, 2), (1, 1, 1), (2, 2, 2), (3, 3, 1), (8, 8, 2)])
def test_presets(gpus: int, processes: int, context_parallel: int) -> None:
    preset = preset_for(gpus)
    arguments = list(preset.arguments)
    assert preset.processes == processes
    assert arguments[arguments.index("--context-parallel-size") + 1] == str(context_parallel)
    assert arguments[arguments.index("--distributed-backend") + 1] == ("nccl" if gpus else "gloo")


def test_default_text_is_there() -> None:
    assert sum(Path(file).stat().st_size for file in default_text()) > 1_000_000


def test_last_iteration() -> None:
    assert last_iteration(1, 160, 120) == 120
    assert last_iteration(121, 160, 120) == 160
    assert last_iteration(120, 160, 120) == 120
    assert last_iteration(5, 160, None) == 160


def test_tokens_a_second_where_batches_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 and then 6 sequences of 100 tokens, each in 4 seconds."""
    bar, seconds, batches = SimpleNamespace(n=0, total=9), iter([0, 0, 4.0, 8.0]), iter([2, 6])
    shown = []
    bar.set_description = lambda *_, **__: None
    bar.set_postfix = lambda values, **_: shown.append(values["tokens/s"])
    bar.update = lambda steps: setattr(bar, "n", bar.n + steps)
    monkeypatch.setattr(progress, "tqdm", lambda initial, **_: setattr(bar, "n", initial) or bar)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    monkeypatch.setattr(progress, "get_current_global_batch_size", lambda: next(batches))
    args = SimpleNamespace(attention="dense", seq_length=100, train_iters=9, exit_interval=None, global_batch_size=1)
    monkeypatch.setattr(progress, "get_args", lambda: args)
    for name, value in (("get_rank", 0), ("get_world_size", 1)):
        monkeypatch.setattr(progress.torch.distributed, name, lambda value=value: value)
    one = progress.Progress()
    one.seconds_between = 3
    for iteration in (1, 2, 3):
        one.update({}, iteration)
    assert shown == ["50", "150"]  # when the first ended, the clock began
