"""A dense warm-up in the same job: what it is, what it is refused with, and that the run is that of a job for each stage."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_lighthouse.launch import check
from megatron_lighthouse.mcore.command_line import resume, stored
from megatron_lighthouse.mcore.command_line.settings import LighthouseSettings, settings_from
from megatron_lighthouse.mcore.command_line.stage import Schedule
from megatron_lighthouse.plots import read_scalars
from tests.mcore.harness import MODEL, ROOT, TEXT, Processes, Run, run
from tests.mcore.test_evaluate import evaluate
from tests.mcore.test_spec import SETTINGS, transformer_config
from tests.mcore.test_stage import arguments, validation
from tests.tolerances import assert_close

WARMUP, SWITCH = "--lighthouse-dense-warmup-iters", "--lighthouse-stage2-at"
BEGINS, RETURNS, ENDS = 2, 5, 8
"""The last iterations that are dense at first, that use Lighthouse, and of all."""


@pytest.mark.parametrize(
    ("schedule", "dense"),
    [
        (Schedule(dense_warmup_iters=1), [5, 0, 0, 0, 0, 0]),
        (Schedule(4, 1, 3), [5, 5, 5, 0, 5, 5]),
        (Schedule(3, 5, 1), [5, 0, 0, 1, 2, 3]),
    ],
    ids=str,
)
def test_dense_layers_in_iterations_1_to_6(schedule: Schedule, dense: list[int]) -> None:
    assert [schedule.dense_layers(iteration, 5) for iteration in range(1, 7)] == dense
    assert [schedule.all_dense(iteration) for iteration in range(1, 7)] == [n == 5 for n in dense]


def test_a_layer_that_begins_dense_is_still_a_lighthouse_layer() -> None:
    """It is built as one, and before the first iteration it is what the first will make of it."""
    settings = LighthouseSettings(dense_first=1, dense_last=1, schedule=Schedule(dense_warmup_iters=3))
    assert [settings.is_dense(2, 4, iteration) for iteration in (None, 0, 1, 3, 4)] == [False, True, True, True, False]
    assert settings.at_first(2, 4)[0] is settings.attention


def test_why_layers_are_dense() -> None:
    warmup, both = Schedule(dense_warmup_iters=2), Schedule(5, 2, 2)
    assert {warmup.because(iteration) for iteration in (0, 1, 2, 3, 9)} == {f"{WARMUP} 2"}
    assert [both.because(iteration) for iteration in (1, 3, 5, 6)] == [f"{WARMUP} 2"] * 3 + [f"{SWITCH} 5"]


def test_arguments() -> None:
    assert settings_from(arguments(WARMUP, "3")).schedule == Schedule(dense_warmup_iters=3)
    assert settings_from(arguments(WARMUP, "3", SWITCH, "7")).schedule == Schedule(7, 1, 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"{WARMUP} 0", f"{WARMUP} 0 must be at least 1: use a number of iterations"),
        (f"{WARMUP} 7 {SWITCH} 7", f"use {WARMUP} 6 or less, or {SWITCH} 8 or more"),
        (f"{WARMUP} 3 {SWITCH} 1", f"before {SWITCH} 1: use {SWITCH} 4 or more"),
        (f"{WARMUP} 3 --lighthouse-return layers", f"add {SWITCH} ITER"),
    ],
)
def test_arguments_that_are_refused(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings_from(arguments(*words.split()))


@pytest.mark.parametrize(
    ("schedule", "train_iters", "advice"),
    [
        (Schedule(dense_warmup_iters=9), 10, None),
        (Schedule(dense_warmup_iters=10), 10, f"use at most {WARMUP} 9"),
        (Schedule(dense_warmup_iters=3), 1, "use at least --train-iters 4"),
        (Schedule(dense_warmup_iters=3), None, None),
        (Schedule(9, 1, 8), 10, None),
        (Schedule(10, 1, 9), 10, "use at least --train-iters 11"),  # 9 would leave no iteration with Lighthouse
        (Schedule(10, 1, 8), 10, f"use at most {SWITCH} 9"),
    ],
    ids=str,
)
def test_it_leaves_iterations_with_lighthouse(schedule: Schedule, train_iters: int | None, advice: str | None) -> None:
    problems = [*schedule.problems(train_iters)]
    assert len(problems) == (advice is not None)
    assert advice is None or advice in problems[0]


@pytest.mark.parametrize(
    ("skipped", "advice"),
    [([2], [f"use {WARMUP} 1"]), ([1, 2], [f"use {WARMUP} 3"]), ([1, 2, 3], ["leave one"]), ([2, 4], ["1", f"use {SWITCH} 3"])],
    ids=str,
)
def test_the_iterations_before_both_switches_are_trained(skipped: list[int], advice: list[str], tmp_path: Path) -> None:
    from megatron_lighthouse.mcore.command_line.checks import run_problems

    given = Namespace(seq_length=256, train_iters=20, iterations_to_skip=skipped, save="folder", load=str(tmp_path))
    problems = [*run_problems(given, transformer_config(), replace(SETTINGS, schedule=Schedule(4, 1, 2)))]
    assert [text in problem for text, problem in zip(advice, problems, strict=True)] == [True] * len(advice)


def test_what_does_not_go_with_it(megatron: None) -> None:
    from megatron_lighthouse.mcore.command_line.arguments import use_attention
    from megatron_lighthouse.mcore.command_line.checks import check as check_model

    config, settings = transformer_config(), replace(SETTINGS, schedule=Schedule(dense_warmup_iters=7))
    given = arguments("--attention", "wall", WARMUP, "7")
    given.load, given.finetune, given.seq_length = None, False, 256
    with pytest.raises(ValueError, match=rf"{WARMUP} 7 .* leave it out, or use --attention lighthouse"):
        use_attention(given, Namespace(transformer_layer_spec=None, transformer=config))
    config.cuda_graph_impl = "local"
    check_model(config, settings, None)
    config.cuda_graph_impl = "transformer_engine"
    with pytest.raises(ValueError, match=rf"{WARMUP} 7 would change nothing: use .* dense in the first of them"):
        check_model(config, settings, None)


@pytest.mark.parametrize(
    ("was", "iteration", "now", "refused"),
    [
        ("lighthouse 400", 500, "lighthouse 400", False),
        ("lighthouse 400", 500, "lighthouse 600", True),
        ("lighthouse 400", 500, "lighthouse 450", True),
        ("lighthouse 400", 500, "lighthouse 300", True),
        ("lighthouse 400", 500, "lighthouse", True),
        ("lighthouse", 100, "lighthouse 400", True),
        ("lighthouse 400", 400, "lighthouse 600", False),  # the switch tried again, from its checkpoint
        ("lighthouse 400", 300, "lighthouse 300", False),  # or earlier
        ("lighthouse 400", 500, "dense", False),  # stage 2 in a job of its own
        ("dense", 500, "lighthouse", False),  # a warm-up in one
        ("dense", 500, "lighthouse 400", False),
        ("dense 400", 500, "dense 600", True),  # by --spec, whatever the name
        ("lighthouse 400", 500, "lighthouse 600 --no-load-optim", True),
        ("lighthouse 400", 500, "lighthouse 600 --finetune", False),
        ("lighthouse 400", 500, "lighthouse 600 --skip-train", False),
    ],
)
def test_a_resume_keeps_the_warmup_that_has_ended(was: str, iteration: int, now: str, refused: bool, tmp_path: Path) -> None:
    import torch

    checkpoint = tmp_path / f"iter_{iteration:07}"
    checkpoint.mkdir()
    (tmp_path / stored.TRACKER).write_text(str(iteration))
    attention, _, end = was.partition(" ")
    args = Namespace(attention=attention, lighthouse_dense_warmup_iters=int(end) if end else None)
    torch.save({"args": args}, checkpoint / "common.pt")

    def found(folders: tuple[Path | None, Path | None]) -> list[str]:
        given = check.parse([*MODEL, *re.sub(r" (\d+)", rf" {WARMUP} \1", f"--attention {now}").split()])
        return [problem for problem in resume.problems(given, *folders) if WARMUP in problem]

    assert len(problems := found((tmp_path, None))) == refused
    assert not found((None, tmp_path))  # --pretrained-checkpoint
    if refused:
        ends = [words.removeprefix(attention).split("--")[0].strip() or "none" for words in (was, now)]
        assert f"{WARMUP} {ends[0]}, and this run has {ends[1]}," in problems[0]
        assert (f"give {WARMUP} {end}, or" if end else "leave it out, or") in problems[0]


def test_the_progress_bar_says_dense_in_it() -> None:
    from megatron_lighthouse.mcore.loop.progress import attention_in

    given = arguments("--attention", "lighthouse", WARMUP, "3", SWITCH, "7")
    assert [attention_in(given, iteration) for iteration in (1, 3, 4, 7, 8)] == ["dense"] * 2 + ["lighthouse"] * 2 + ["dense"]


# whole runs: in one job, and in three. On two ranks that share each sequence, except where it says otherwise

STEPS = ["--train-iters", str(ENDS), "--eval-interval", "2", "--eval-iters", "1"]
SHARED = ["--context-parallel-size", "2", *STEPS]
SCHEDULED = ["--attention", "lighthouse", WARMUP, str(BEGINS), SWITCH, str(RETURNS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("warmup")


@pytest.fixture(scope="module")
def in_one_job(folder: Path) -> Run:
    save = ["--save", str(folder / "checkpoint"), "--save-interval", "1"]
    return run(folder / "one", *SHARED, *SCHEDULED, *save, "--lighthouse-telemetry-interval", "1", ranks=2)


def from_iteration(folder: Path, iteration: int) -> list[str]:
    return ["--load", str(folder / "checkpoint"), "--ckpt-step", str(iteration)]


def test_one_job_is_the_same_run_as_three(folder: Path, in_one_job: Run) -> None:
    """A dense job, one with Lighthouse that takes up its checkpoint, and a dense one."""
    parts: dict[str, list[str]] = {
        "first": [
            "--attention",
            "dense",
            "--exit-interval",
            str(BEGINS),
            "--save",
            str(folder / "of-dense"),
            "--save-interval",
            "2",
        ],
        "second": ["--attention", "lighthouse", "--exit-interval", str(RETURNS), "--load", str(folder / "of-dense")],
        "third": ["--attention", "dense", *from_iteration(folder, RETURNS)],
    }
    runs = [run(folder / name, *SHARED, *words, ranks=2) for name, words in parts.items()]
    assert [list(part.losses) for part in runs] == [[1, 2], [3, 4, 5], [6, 7, 8]]
    for what in ("losses", "gradient_norms"):
        found: dict[int, Any] = {}
        for part in runs:
            found |= getattr(part, what)
        assert found == getattr(in_one_job, what)
    evaluated = [point for name in parts for point in validation(folder / name)]
    assert evaluated == validation(folder / "one")
    assert len(evaluated) == 4


def test_what_the_run_says(folder: Path, in_one_job: Run) -> None:
    assert in_one_job.log.count("Lighthouse layers are dense") == 3
    for iteration, dense, because in ((1, 2, WARMUP), (BEGINS + 1, 0, WARMUP), (RETURNS + 1, 2, SWITCH)):
        at = RETURNS if because == SWITCH else BEGINS
        assert f"iteration {iteration}: {dense} of 2 Lighthouse layers are dense ({because} {at})" in in_one_job.log
    scalars = read_scalars(folder / "one" / "tensorboard")
    steps, layers = scalars["lighthouse/layers"]
    assert dict(zip(steps, layers, strict=True)) == {1: 0, 2: 0, 3: 2, 4: 2, 5: 2, 6: 0, 7: 0, 8: 0}
    selected = {tuple(steps) for name, (steps, _) in scalars.items() if "/layer-" in name}
    assert selected == {(3, 4, 5)}  # telemetry, of layers that select


@pytest.mark.parametrize("iteration", [1, 3, 6])
def test_resumed_in_any_stage_at_another_layout(iteration: int, folder: Path, in_one_job: Run) -> None:
    """Two pipeline stages, which must switch in the same iteration, or two tensor-parallel ranks."""
    layout = "--tensor-model-parallel-size" if iteration == 3 else "--pipeline-model-parallel-size"
    saved = folder / f"saved-{iteration}"
    more = [layout, "2", *from_iteration(folder, iteration), "--save", str(saved), "--save-interval", "4"]
    resumed = run(folder / f"from-{iteration}", *STEPS, *SCHEDULED, *more, "--save-retain-interval", "8", ranks=2).losses
    assert list(resumed) == [*range(iteration + 1, ENDS + 1)]
    assert_close(list(resumed.values()), [in_one_job.losses[i] for i in resumed], "parallel loss")
    # those before a switch are saved, and spared by --save-retain-interval: unlike that of iteration 4
    kept = [i for i in (BEGINS, RETURNS, ENDS) if i > iteration]
    assert sorted(f.name for f in saved.glob("iter_*")) == [f"iter_{i:07}" for i in kept]


def test_an_evaluation_within_it_is_dense(folder: Path, in_one_job: Run) -> None:
    """Of the loop with --skip-train: the bits of dense attention, and after it others."""
    loaded = {iteration: from_iteration(folder, iteration) for iteration in (BEGINS, 3)}
    found = {
        (name, iteration): evaluated(folder / f"{name}-{iteration}", *words, *loaded[iteration])
        for name, words in {"scheduled": SCHEDULED, "dense": ["--attention", "dense"]}.items()
        for iteration in loaded
    }
    assert found["scheduled", BEGINS] == found["dense", BEGINS]
    assert found["scheduled", 3] != found["dense", 3]


def test_the_evaluation_of_its_checkpoint_is_dense(folder: Path, in_one_job: Run) -> None:
    """By the run's own arguments."""
    (folder / "held-out.txt").write_bytes((ROOT / "README.md").read_bytes()[:1100])
    given = ["--held-out", str(folder / "held-out.txt"), "--out", str(folder / "out"), *from_iteration(folder, BEGINS)]
    few = ["--loss-sequences", "2", "--passkey-samples", "0", "--variables-samples", "0"]
    result = evaluate(1, *SCHEDULED, *STEPS, *given, *few)
    assert result.returncode == 0, result.stdout[-3000:]
    summary = json.loads((folder / "out" / "evaluation.json").read_text())
    assert [summary[name] for name in ("iteration", "attention", "lighthouse_layers")] == [BEGINS, "dense", 0]
    result = evaluate(1, *SCHEDULED, *STEPS, *given, *few, "--hindsight-samples", "2")
    assert result.returncode == 2
    assert f"all are dense ({WARMUP} {BEGINS}): give --ckpt-step 3 or 4 or 5, or" in result.stdout


def evaluated(folder: Path, *words: str) -> list[str]:
    """The losses that the loop prints, of one process."""
    one = Processes(folder, 1, [*MODEL, *STEPS, "--data-cache-path", str(folder / "data"), *words, "--skip-train", *TEXT])
    statuses, log = one.wait(), one.log.read_text(errors="replace")
    assert statuses == [0], log[-5000:]
    found = re.findall(r"lm loss value: (\S+)", log)
    assert found
    return found
