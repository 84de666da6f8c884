"""The numbers of a command line: what the entry point would refuse is not queued, and what it takes is."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from megatron_lighthouse.launch import check
from megatron_lighthouse.mcore.command_line.settings import add_arguments, settings_from
from tests.launch.scripts import refused, submit, words
from tests.mcore.test_spec import transformer_config

SWITCH = "--lighthouse-stage2-at"
WARMUP = "--lighthouse-dense-warmup-iters"
ENDS = "--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split"


def problems(error: str) -> list[str]:
    return [line for line in error.splitlines() if line.startswith("  - ")]


def checked(recipe: str, more: str, gpus: int = 8) -> int:
    return check.main(["--nodes", "1", "--gpus-per-node", str(gpus), "--", *words(recipe), "--mock-data", *more.split()])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (f"--train-iters 100 {SWITCH} 100", f"{SWITCH} 100 leaves no iteration of --train-iters 100 .* at most {SWITCH} 99"),
        (f"--attention dense {SWITCH} 5", f"{SWITCH} 5 makes Lighthouse layers dense, .* use --attention lighthouse"),
        (f"--attention dense {WARMUP} 5", f"{WARMUP} 5 makes Lighthouse layers dense, .* use --attention lighthouse"),
        (f"--train-iters 9 {WARMUP} 9", f"{WARMUP} 9 leaves no iteration of --train-iters 9 .* at most {WARMUP} 8"),
        (
            f"{WARMUP} 5 {SWITCH} 5",
            f"{WARMUP} 5 leaves no iteration .* before {SWITCH} 5: use {WARMUP} 4 or less, or {SWITCH} 6",
        ),
        ("--lighthouse-return layers", f"says how layers become dense, .* add {SWITCH} ITER"),
        ("--lighthouse-dense-first 29 --lighthouse-dense-last 1", "29 and .* 1 leave none of 30 layers to Lighthouse"),
        ("--lighthouse-dense-last -1", "--lighthouse-dense-last -1 must not be negative"),
        (
            "--train-samples 800 --global-batch-size 8",
            "--train-samples 800 names no iteration at which a job is done, .* use --train-iters 100 alone",
        ),
        ("--attention-dropout 0.1", "--attention-dropout 0.1 would drop whole windows: use --attention-dropout 0 "),
        ("--pipeline-model-parallel-size 4", "--num-layers 30 must be a multiple of .* 4: use --num-layers 28 or 32"),
        (
            f"--num-layers 31 --pipeline-model-parallel-size 8 {ENDS}",
            r"--num-layers 31 \+ 1 .*embedding.* \+ 1 .*loss.* must be a multiple of .* 8: use --num-layers 30 or 38",
        ),
    ],
)
def test_what_the_entry_point_would_refuse(more: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert checked("530m-98k", more) == 1
    (problem,) = problems(capsys.readouterr().err)
    assert re.search(says, problem), problem


def test_what_megatron_takes_is_queued(capsys: pytest.CaptureFixture[str]) -> None:
    """Of key/value heads and lengths; what Lighthouse asks beyond that stays."""
    many = "--tensor-model-parallel-size 8 --group-query-attention --num-query-groups"
    for more, status in (
        (f"--attention dense {many} 2", 0),  # four ranks share a group
        (f"--attention dense {many} 3", 1),
        (f"--attention lighthouse {many} 2", 1),
        ("--tensor-model-parallel-size 8 --num-query-groups 3", 0),  # not read without --group-query-attention
    ):
        assert checked("530m-98k", more) == status, more
    assert "--num-query-groups 2 must be a multiple" in capsys.readouterr().err
    given = words("530m-98k")
    at = given.index("--seq-length")
    without = ["--nodes", "1", "--gpus-per-node", "8", "--", *given[:at], *given[at + 2 :], "--mock-data"]
    assert check.main(without) == 1
    assert check.main([*without, "--encoder-seq-length", given[at + 1]]) == 0
    assert check.main([*without, "--use-checkpoint-args"]) == 0


def test_megatrons_dropout_is_not_none(capsys: pytest.CaptureFixture[str]) -> None:
    """Where the command line has no flag."""
    given = words("cpu-test")
    at = given.index("--attention-dropout")
    ours = ["--nodes", "2", "--gpus-per-node", "1", "--", *given[:at], *given[at + 2 :], "--mock-data"]
    assert check.main(ours) == 1
    assert "--attention-dropout 0.1 would drop" in capsys.readouterr().err
    assert check.main([*ours, "--attention", "dense"]) == 1  # over shards, without Transformer Engine
    assert "does not go with --context-parallel-size 2" in capsys.readouterr().err
    assert check.main([*ours, "--attention", "dense", "--context-parallel-size", "1", "--global-batch-size", "2"]) == 0


def test_in_the_words_of_the_entry_point(capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_lighthouse.mcore.command_line import checks

    wrong = "--attention-dropout 0.25 --lighthouse-dense-first 5 --lighthouse-dense-last -1"
    assert checked("cpu-test", wrong, 2) == 1
    said = problems(capsys.readouterr().err)
    settings = settings_from(add_arguments(argparse.ArgumentParser()).parse_args(wrong.split()[2:]))
    with pytest.raises(ValueError, match="cannot run as asked") as error:
        checks.check(transformer_config(num_layers=4, attention_dropout=0.25), settings, None)
    assert said == problems(str(error.value))


@pytest.mark.parametrize(
    "more",
    [
        f"--attention dense --skip-train {SWITCH} 5",  # what --as evaluation adds
        f"--attention dense --spec megatron_lighthouse.mcore.spec lighthouse {SWITCH} 5",
        f"--train-iters 100 {SWITCH} 99",
        "--use-checkpoint-args --attention-dropout 0.1",
        f"--pipeline-model-parallel-size 4 {ENDS}",
        "--num-layers 31 --pipeline-model-parallel-size 4 --account-for-embedding-in-pipeline-split",
        "--num-layers 5 --pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 2",
        "--num-layers 5 --pipeline-model-parallel-size 2 --decoder-last-pipeline-num-layers 2",
        "--num-layers 5 --pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Ettt|ttL",
    ],
)
def test_what_the_entry_point_takes(more: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert checked("530m-98k", more) == 0, capsys.readouterr().err


def test_a_dense_point_has_nothing_to_switch(tmp_path: Path) -> None:
    study = ["--study", "CP=2 SEQ=256 ATTENTION=dense:lighthouse"]
    error = refused(tmp_path, "--cluster", "cpu-test", "--recipe", "cpu-test", *study, "--", "--mock-data", SWITCH, "5")
    assert f"dense-256-cp2: {SWITCH} 5 makes" in error
    assert "lighthouse-256-cp2: " not in error


@pytest.mark.parametrize("word", ["--train-iters 100", "--train-samples=800", "--exit-interval=5"])
def test_iterations_of_two_jobs_are_named_once(word: str, tmp_path: Path) -> None:
    """Else they would be passed over without a word."""
    ours = ["--cluster", "cpu-test", "--recipe", "cpu-test", "--stage1", "6", "--total", "20"]
    done = submit(tmp_path, *ours, "--", "--mock-data", *word.split(), script="two_stage.sh")
    name = word.replace("=", " ").split()[0]
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{name} after the -- is what --stage1 and --total say of each job: leave it out." in done.stderr


@pytest.mark.parametrize("word", [[SWITCH, "15"], [f"{SWITCH}=15"]])
def test_two_jobs_do_not_switch_in_one(word: list[str], tmp_path: Path) -> None:
    ours = ["--cluster", "cpu-test", "--recipe", "cpu-test", "--stage1", "6", "--total", "20"]
    done = submit(tmp_path, *ours, "--", "--mock-data", *word, script="two_stage.sh")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{SWITCH} 15 is both stages in one job, and two_stage.sh queues a job for each: leave it out" in done.stderr
    assert not (tmp_path / "queued").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--attention wall", "--attention wall is neither stage's, which are lighthouse and dense"),
        ("--attention parallax --lighthouse-around wall", "which are lighthouse and wall (--lighthouse-around): leave it out"),
        ("--attention dense", ""),
        ("--attention=parallax --lighthouse-around parallax", ""),
    ],
)
def test_an_attention_of_neither_stage_is_not_passed_over(words: str, says: str, tmp_path: Path) -> None:
    ours = [
        "--cluster",
        "cpu-test",
        "--recipe",
        "cpu-test",
        "--stage1",
        "6",
        "--total",
        "20",
        "--check",
        "0",
        "--only-check",
        "1",
    ]
    done = submit(tmp_path, *ours, "--", "--mock-data", *words.split(), script="two_stage.sh")
    assert done.returncode == (2 if says else 0), done.stderr
    assert says in done.stderr


@pytest.mark.parametrize("words", ["--train-iters 2", "--train-iters 1", "--train-iters 10 --exit-interval 2"])
@pytest.mark.parametrize("script", ["submit.sh", "local.sh"])
def test_a_point_has_an_iteration_that_is_timed(script: str, words: str, tmp_path: Path) -> None:
    """Else its row of the table is empty, when the GPUs have been had."""
    study = ("--cluster", "cpu-test", "--recipe", "cpu-test", "--study", "CP=2 SEQ=256", "--", "--mock-data")
    done = submit(tmp_path, *study, *words.split(), script=script)
    assert done.returncode == 2
    assert f"{' '.join(words.split()[-2:])} ends a point before its third iteration" in done.stderr


@pytest.mark.parametrize(
    ("study", "says"),
    [
        ("CP=2:2 SEQ=256", "CP=2:2 holds 2 twice"),
        ("SEQ=256:512:256", "SEQ=256:512:256 holds 256 twice"),
        ("SEQ=256 ATTENTION=dense:dense", "ATTENTION=dense:dense holds dense twice"),
    ],
)
def test_a_point_is_in_a_study_once(study: str, says: str, tmp_path: Path) -> None:
    error = refused(tmp_path, "--cluster", "cpu-test", "--recipe", "cpu-test", "--study", study, "--", "--mock-data")
    assert f"--study '{study}': {says}, and a point runs once: leave one of them out." in error
