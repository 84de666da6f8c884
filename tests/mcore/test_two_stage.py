"""The recipe behind `make train`: two stages, pictures, and going on where it stopped."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace

import pytest
from torch.utils.tensorboard import SummaryWriter

from megatron_lighthouse.mcore.command_line import kept
from megatron_lighthouse.mcore.command_line.stored import last_iteration as last_checkpoint
from megatron_lighthouse.mcore.loop import progress
from megatron_lighthouse.mcore.loop.progress import last_iteration
from megatron_lighthouse.plots import read_scalars
from megatron_lighthouse.recipe import recovery, two_stage
from megatron_lighthouse.recipe.begun import check_begun
from megatron_lighthouse.recipe.presets import default_text, preset_for
from tests.mcore.forks import warm
from tests.mcore.harness import ROOT, Processes


def recipe(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_lighthouse.recipe.two_stage", "--runs", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **warm()})


def test_both_stages_and_again(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("the GPU preset takes minutes; benchmarks/h100_training.py runs it")
    text = tmp_path / "text.txt"
    text.write_bytes(b"".join(path.read_bytes() for path in sorted((ROOT / "docs").glob("*.md"))))  # a twentieth is enough
    tiny = ["--seq-length", "1024", "--eval-iters", "1"]
    short = ["--name", "short", "--steps", "2", "--dense-steps", "1", "--data", str(text), *tiny]
    first = recipe(tmp_path, *short)
    assert first.returncode == 0, first.stdout + first.stderr
    run = tmp_path / "short"
    assert list(read_scalars(run / "tensorboard" / "lighthouse")["lm loss"][0]) == [1, 2]
    assert list(read_scalars(run / "tensorboard" / "dense")["lm loss"][0]) == [3]
    for picture in ("loss.png", "selection.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")
    assert "tokens/s=" in first.stdout
    again = recipe(tmp_path, *short)
    assert again.returncode == 0
    assert [text in again.stdout for text in ("lighthouse: trained already", "dense: trained already")] == [True, True]
    assert "Nothing was left to train: the last command below goes on, and --name NAME" in again.stdout
    refused_where_something_differs(tmp_path, short)
    what_was_printed_runs(again.stdout, tmp_path)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--dense-step 3", "--dense-step is not a known flag: did you mean --dense-steps?"),
        ("--lighthouse-bugdet 64", "--lighthouse-bugdet is not a known flag: did you mean --lighthouse-budget?"),
        ("--seq-length 128 -- --steps 3", "-- among the arguments hides all flags behind it: leave it out."),
        ("--seq-length 1000", "--seq-length 1000 must be a multiple of"),
        ("--data nowhere", "nowhere is not there"),
        ("--train-iters 7", "--train-iters is made of --steps and --dense-steps here: use these."),
        ("--save=/x", "--save is made of --runs and --name here: use these."),
    ],
)
def test_what_no_run_takes_is_refused_before_one_begins(
    words: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(two_stage, "_gpus", lambda: 0)
    monkeypatch.setattr(two_stage, "_follow", lambda *_: pytest.fail("a stage has begun"))
    try:
        status = two_stage.main(["--runs", str(tmp_path / "runs"), *words.split()])
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def refused_where_something_differs(folder: Path, short: list[str]) -> None:
    other = folder / "other.txt"
    other.write_text("other text " * 200)
    cases: list[tuple[list[str], list[str]]] = [
        (["--steps", "3"], ["--steps 3, there 2"]),
        (["--dense-steps", "4"], ["--dense-steps 4, there 1"]),
        (["--data", str(other)], [f"--text-data {other}, there {folder / 'text.txt'}"]),
        (["--seq-length", "2048", "--num-layers", "6"], ["--seq-length 2048, there 1024", "--num-layers 6, there 4"]),
        (["--qk-layernorm"], ["--qk-layernorm given, there not given"]),
        (["--seed", "4"], ["--seed 4, there not given"]),
    ]
    for asked, says in cases:
        assert_refused(folder, [*short, *asked], says)
    files = [folder / "short" / "tensorboard" / name / kept.NAME for name in ("lighthouse", "dense")]
    for path in files:  # a run of an earlier version: its checkpoint says it
        path.rename(path.with_suffix(".away"))
    for asked, says in [*cases[2:4], (["--steps", "3"], ["--train-iters 4, there 3"])]:
        assert_refused(folder, [*short, *asked], says)
    for path in files:
        path.with_suffix(".away").rename(path)


def assert_refused(folder: Path, words: list[str], says: list[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        two_stage.main(["--runs", str(folder), *words])
    assert all(line in str(refusal.value) for line in [*says, "was begun otherwise"]), refusal.value


def what_was_printed_runs(printed: str, folder: Path) -> None:
    """The commands after the last line of `make train`, at a size for a test."""
    commands = [shlex.split(line) for line in printed.split("Next:")[1].splitlines() if " -m megatron" in line]
    modules = [next(word for word in words if word.startswith("megatron_lighthouse.")) for words in commands]
    assert [name.rsplit(".", 1)[1] for name in modules] == ["evaluate", "recovery", "pretrain_gpt"]
    given = [words[words.index(module) + 1 :] for words, module in zip(commands, modules, strict=True)]
    assert recovery.main(given[1]) == 0
    assert (folder / "short" / "recovery.csv").exists()
    few = ["--loss-sequences", "1", "--passkey-samples", "0"]
    for ranks, words, module in ((1, [*given[0], *few], modules[0]), (2, given[2], modules[2])):
        processes = Processes(folder / module, ranks, words, module)
        assert processes.wait() == [0] * ranks, processes.log.read_text()[-3000:]
    asked = [*given[0], "--ckpt-step", "3", "--attention", "lighthouse", "--hindsight-samples", "1"]  # of the second job
    processes = Processes(folder / "hindsight", 1, [*asked, *few, "--out", str(folder / "out")], modules[0])
    assert processes.wait() == [2]
    assert (
        "all are dense (as they were trained): give --ckpt-step 1 or 2, or --hindsight-samples 0." in processes.log.read_text()
    )
    summary = json.loads((folder / "short" / "evaluation" / "evaluation.json").read_text())
    assert (summary["iteration"], summary["attention"], summary["loss"]["unit"]) == (3, "dense", "byte")
    assert last_checkpoint(folder / "short" / "checkpoints") == 4
    assert all(said not in processes.log.read_text() for said in ("nothing is left to train", "selected nothing here"))
    processes = Processes(folder / "again", 2, given[2], modules[2])
    assert processes.wait() == [0, 0], processes.log.read_text()[-3000:]
    assert (
        processes.log.read_text().count("nothing is left to train: the checkpoint is of iteration 4, and --train-iters 4") == 1
    )


@pytest.mark.slow
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


def trained(run: Path, iteration: int) -> None:
    """What a run leaves that the recipe looks at, of `iteration` iterations."""
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    for attention in ("lighthouse", "dense"):
        with SummaryWriter(str(run / "tensorboard" / attention)) as log:
            log.add_text("seq_length", "64")
            if attention == "lighthouse":
                log.add_scalar("lm loss", 2.5, 2)
                log.add_scalar("lm loss validation", 2.25, 2)


@pytest.mark.parametrize(("iteration", "goes_on_to"), [(3, 4), (4, 5), (7, 8)])
def test_the_command_that_goes_on_trains_however_often_it_was_run(
    iteration: int, goes_on_to: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(tmp_path / "short", iteration)
    assert two_stage.main(["--runs", str(tmp_path), "--name", "short", "--steps", "2", "--dense-steps", "1"]) == 0
    printed = capsys.readouterr().out
    assert f"--train-iters {goes_on_to} --exit-interval {goes_on_to} " in printed.splitlines()[-1]
    assert "long text (YOUR_TEXT is any it has not read: it held out 0 tokens, less than a sequence of 2,048)" in printed


TOLD = "raise SystemExit('torch.distributed.elastic.multiprocessing.api.SignalException: Process 7 got signal: 2')"
LONG = "import time; print('x' * 200_000, flush=True); time.sleep(600)"


@pytest.mark.parametrize(
    ("iteration", "says"),
    [
        (60, "Interrupted: the same command goes on from iteration 60.\n"),
        (0, "Interrupted, before a checkpoint: it begins anew.\n"),
    ],
)
@pytest.mark.parametrize("program", [TOLD, LONG], ids=["torchrun is told", "this process is"])
def test_interrupted(
    program: str, iteration: int, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "demo"
    trained(run, iteration)
    monkeypatch.setattr(two_stage, "_gpus", lambda: 0)
    monkeypatch.setattr(two_stage, "_command", lambda *_: [sys.executable, "-c", program])

    def press() -> None:
        while not (run / "lighthouse.log").exists() or not (run / "lighthouse.log").stat().st_size:
            time.sleep(0.05)
        while not over.wait(2):  # once more where it came just before a read, which then went on
            os.kill(os.getpid(), signal.SIGINT)

    over, handler = (
        Event(),
        signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # ignored where tests run in the background
    if program == LONG:
        Thread(target=press, daemon=True).start()
    try:
        assert two_stage.main(["--runs", str(tmp_path)]) == 130
    finally:
        over.set()
        signal.signal(signal.SIGINT, handler)
    assert capsys.readouterr().err == f"\n{says}"


def test_one_stage_that_went_on_is_not_begun_otherwise(tmp_path: Path) -> None:
    """The job that went on left its own arguments, of one iteration more."""
    run, asked = tmp_path / "one", ["--attention", "parallax", "--train-iters", "4", "--exit-interval", "4"]
    trained(run, 5)
    there = [*asked, "--train-iters", "5", "--exit-interval", "5", "--override-opt-param-scheduler"]
    log = run / "tensorboard" / "parallax"
    kept.keep(Namespace(rank=0, world_size=2, skip_train=False, save=None, tensorboard_dir=str(log)), there)
    check_begun(run, {"parallax": asked}, (4, 0))
    with pytest.raises(ValueError, match="--steps 6, there 5"):
        check_begun(run, {"parallax": asked}, (6, 0))


def test_a_stage_without_a_logged_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As --tensorboard-log-interval leaves a stage that is shorter."""
    trained(tmp_path / "short", 3)
    assert two_stage.main(["--runs", str(tmp_path), "--name", "short", "--steps", "2", "--dense-steps", "1"]) == 0
    printed = capsys.readouterr().out
    assert "lighthouse: loss 2.500 at iteration 2; validation loss 2.250 at iteration 2" in printed
    assert "dense: loss" not in printed
    assert (tmp_path / "short" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_failed_run_shows_why(tmp_path: Path) -> None:
    result = recipe(tmp_path, "--data", str(ROOT / "LICENSE"), "--decoder-seq-length", "262144")  # which Megatron refuses
    assert result.returncode != 0
    assert "Megatron refuses the arguments: assert args.max_position_embeddings >= args.decoder_seq_length" in result.stderr
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
    monkeypatch.setattr(progress, "bar", lambda initial, **_: setattr(bar, "n", initial) or bar)
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
