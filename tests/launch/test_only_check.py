"""--only-check of the scripts that queue jobs: what it says, and what it tells apart."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.launch.scripts import LAUNCH, common, submit

OURS = ("--cluster", "cpu-test", "--recipe", "cpu-test")
STAGES = ("--stage1", "10", "--total", "20")
DOWN = "allocation failure: Unable to contact slurm controller (connect failure)"
REFUSES = "sbatch: error: Batch job submission failed: Invalid partition name specified"


def slurm_says(folder: Path, text: str) -> None:
    """Its sbatch then fails with these words."""
    (folder / "answer").write_text(text)


@pytest.mark.parametrize("script", ["submit.sh", "two_stage.sh"])
@pytest.mark.parametrize(
    ("words", "status", "says"), [(DOWN, 75, "controller does not answer"), (REFUSES, 2, "refuses the flags")]
)
def test_a_controller_that_does_not_answer_is_no_refusal(
    script: str, words: str, status: int, says: str, tmp_path: Path
) -> None:
    stages = STAGES if script == "two_stage.sh" else ()
    slurm_says(tmp_path, words)
    done = submit(tmp_path, *OURS, *stages, "--check", "0", "--", "--mock-data", script=script)
    assert done.returncode == status, done.stderr
    assert words in done.stderr
    assert f"Nothing was queued: Slurm{'' if status == 2 else chr(39) + 's'} {says}" in done.stderr


def test_both_stages_and_the_evaluation_are_checked_in_one_go(tmp_path: Path) -> None:
    stages = (*STAGES, "--eval-iters", "2", "--only-check", "1", "--check", "quick")
    done = submit(tmp_path, *OURS, *stages, "--", "--mock-data", script="two_stage.sh")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Nothing was queued (--only-check 1): the check passed, and Slurm takes it.") == 1
    for label in ("stage-1", "stage-2", "evaluation"):
        assert f"{label}: 2 ranks = TP 1 x CP 2" in done.stderr
    queued = (tmp_path / "queued").read_text().splitlines()
    assert len(queued) == 3
    assert all(line.startswith("--test-only ") for line in queued)
    assert not (tmp_path / "run").exists()
    wrong = submit(tmp_path, *OURS, *stages, "--", "--mock-data", "--perform-rl-step", script="two_stage.sh")
    assert wrong.returncode == 2
    assert "- stage-1, stage-2, evaluation: --perform-rl-step (text by inference paths) is not done by" in wrong.stderr
    assert "Nothing was queued." in wrong.stderr


def test_what_was_not_checked_is_said(tmp_path: Path) -> None:
    done = submit(tmp_path, *OURS, "--check", "0", "--only-check", "1", "--", "--mock-data")
    assert done.returncode == 0
    assert "Slurm takes it; nothing else was checked (--check 0)." in done.stderr


@pytest.mark.parametrize(
    ("study", "more", "points"),
    [
        ("ATTENTION=dense", "", "dense 256 2"),
        ("ATTENTION=dense", "--seq-length 512 --context-parallel-size=1", "dense 512 1"),
        ("SEQ=128:256 ATTENTION=dense", "", "dense 128 2 dense 256 2"),
        ("CP=1", "", "dense 256 1 lighthouse 256 1"),
    ],
)
def test_a_study_is_of_the_recipe_s_length(study: str, more: str, points: str) -> None:
    """And of its context-parallel size, unless the study names others."""
    made = f'read_recipe {LAUNCH}/recipes/cpu-test.args; MEGATRON=("$@"); study_points "{study}"; echo "${{POINTS[@]}}"'
    assert common(f'source "{LAUNCH}/study.sh"; {made}', *more.split()).strip() == points


@pytest.mark.parametrize(
    ("words", "rows"),
    [
        ("--vocab-size 500", "500"),
        ("--vocab-size 500 --tokenizer-type TikTokenizer", "500"),
        ("--vocab-size 500 --tokenizer-type HuggingFaceTokenizer", ""),  # its own
        ("--vocab-size 500 --tokenizer-type HuggingFaceTokenizer --padded-vocab-size 640", "640"),
        ("--vocab-size 500 --text-data x", "384"),
    ],
)
def test_the_vocabulary_of_a_point(words: str, rows: str) -> None:
    assert common(f'source "{LAUNCH}/study.sh"; ARGUMENTS=("$@"); vocabulary', *words.split()).strip() == rows


CHECKED = ("--only-check", "1", "--check", "quick")


@pytest.mark.parametrize(
    ("script", "options", "after", "says"),
    [
        (
            "submit.sh",
            (),
            "--save /x --lighthouse-bugdet 1 --context-parallel-size 3",
            ["--save is set by --run", "did you mean --lighthouse-budget?", "--context-parallel-size 3 x"],
        ),
        (
            "two_stage.sh",
            ("--stage1", "1x", "--total", "20", "--eval-iters", "some"),
            "--train-iters 5 --lighthouse-stage2-at 3 --lighthouse-dense-warmup-iters 2 --lr abc",
            [
                "--stage1 1x must be a number of iterations",
                "--train-iters after the --",
                "--lighthouse-stage2-at 3 is both stages in one job",
                "--lighthouse-dense-warmup-iters 2 is of stage 1",
                "--eval-iters some must be",
                "--lr abc must be a number",
            ],
        ),
        (
            "submit.sh",
            ("--nodes", "x", "--time", "4h"),
            "--study CP=1 --nodes=3 --lr abc",
            [
                "--study after the -- is an option of this script: put it before the --.",
                "--nodes=3 after the -- is an option of this script: put it before the --.",
                "--nodes x must be a whole number",
                "TIME='4h'",
                "--lr abc must be a number",
            ],
        ),
    ],
)
def test_what_a_script_refuses_hides_nothing(
    script: str, options: tuple[str, ...], after: str, says: list[str], tmp_path: Path
) -> None:
    done = submit(tmp_path, *OURS, *options, *CHECKED, "--", "--mock-data", *after.split(), script=script)
    assert (done.returncode, done.stderr.count("The run cannot start as asked:")) == (2, 1), done.stderr
    for text in says:
        assert done.stderr.count(text) == 1, (text, done.stderr)
    assert "not a known flag: leave it out" not in done.stderr
    assert not (tmp_path / "queued").exists()


def test_without_the_check_it_is_said_too(tmp_path: Path) -> None:
    for script, stages in (("submit.sh", ()), ("two_stage.sh", STAGES)):
        done = submit(tmp_path, *OURS, *stages, "--check", "0", "--", "--mock-data", "--save", "x", script=script)
        assert (done.returncode, "--save is set by --run" in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "queued").exists()


def test_all_that_is_wrong_with_a_cluster_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.env"
    file.write_text("PARTION=x\nNODES=2\nGPUS_PER_NODE=eight\nARCH=ampere\nNUMA=2\n")
    done = submit(tmp_path, "--cluster", str(file), "--recipe", "moon", *CHECKED, "--", "--mock-data")
    assert done.returncode == 2
    for says in ("PARTION is not a key", "GPUS_PER_NODE='eight'", "ARCH='ampere'", "NUMA='2'", "--recipe moon cannot be read"):
        assert done.stderr.count(says) == 1, (says, done.stderr)


ANYWHERE = "--lr abc --global-batch-size 12 --num-attention-heads 6 --num-query-groups 4"
"""Faults on any number of GPUs, of any kind, and a batch that some numbers would take."""


@pytest.mark.parametrize(
    ("lines", "options", "says"),
    [
        ("NODES=x\nGPUS_PER_NODE=8\nARCH=hopper", "", ["NODES='x'"]),
        ("NODES=1\nGPUS_PER_NODE=0\nARCH=volta\nPARTION=x", "", ["GPUS_PER_NODE='0'", "ARCH='volta'", "PARTION is not a key"]),
        ("ARCH=cpu", "--nodes none", ["--nodes none must be", "NODES=''", "GPUS_PER_NODE=''"]),
        ("NODES=1\nGPUS_PER_NODE=1\nARCH=", "--as trian", ["ARCH=''", "--as trian is not known"]),
        (None, "", ["--cluster {folder}/mine.env cannot be read"]),
        (None, "--profile nsight --check 2", ["mine.env cannot be read", "--profile nsight is not known", "--check 2 must be"]),
        ("NODES=1\nGPUS_PER_NODE=1\nARCH=cpu", "--gpus 8", ["--gpus is not an option of submit.sh"]),
        ("NODES=1\nGPUS_PER_NODE=1\nARCH=cpu", "--study CP=x", ["CP and SEQ hold whole numbers apart by colons, and 'x' is"]),
    ],
)
def test_what_is_not_known_hides_nothing(lines: str | None, options: str, says: list[str], tmp_path: Path) -> None:
    """Neither how many GPUs there are, nor of which kind: the rest is said in the same round, and nothing that may be right."""
    if lines is not None:
        (tmp_path / "mine.env").write_text(f"{lines}\n")
    own = ("--cluster", f"{tmp_path}/mine.env", "--recipe", "cpu-test", *CHECKED, *options.split())
    done = submit(tmp_path, *own, "--", "--data-path", "/nowhere", *ANYWHERE.split())
    assert (done.returncode, done.stderr.count("The run cannot start as asked:")) == (2, 1), done.stderr
    rules = ["--lr abc must be a number", "--num-attention-heads 6 must be a multiple of --num-query-groups 4"]
    for text in [*(one.format(folder=tmp_path) for one in says), *rules]:
        assert done.stderr.count(text) == 1, (text, done.stderr)
    assert ("/nowhere" in done.stderr) == (lines is not None)  # else it may be there on another machine
    assert not (tmp_path / "queued").exists()


def test_a_flag_of_megatron_s_before_the_dashes_is_read(tmp_path: Path) -> None:
    done = submit(tmp_path, *OURS, *CHECKED, "--seq-length", "100", "--lr", "abc", "--", "--mock-data")
    assert "--seq-length is not an option of submit.sh: see --help. Megatron's arguments come after a --." in done.stderr
    assert "--lr abc must be a number" in done.stderr
    assert "--seq-length 100 must be a multiple of" in done.stderr


def test_a_second_pair_of_dashes(tmp_path: Path) -> None:
    done = submit(tmp_path, *OURS, *CHECKED, "--", "--mock-data", "--", "--lr", "abc", "--attention", "dense")
    assert done.stderr.count("\n  - ") == 2, done.stderr
    assert "-- among the arguments hides all flags behind it: leave it out." in done.stderr
    assert "--lr abc must be a number" in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--cluster our.env --recipe cpu-test", "--cluster our.env cannot be read"),
        ("--cluster {folder} --recipe cpu-test", "--cluster {folder} is a folder: give a file"),
        ("--cluster cpu-test --recipe {folder}", "--recipe {folder} is a folder: give a file"),
        ("--cluster cpu-test --recipe cpu-test --only-check", "--only-check needs a value, and -- follows it"),
        ("--cluster cpu-test --recipe cpu-test --time --nodes", "--time needs a value, and --nodes follows it"),
        ("--recipe cpu-test --nodes 1", "--cluster is missing"),
    ],
)
def test_a_name_or_a_value_that_is_none(words: str, says: str, tmp_path: Path) -> None:
    done = submit(tmp_path, *words.format(folder=tmp_path).split(), "--", "--mock-data")
    assert done.returncode == 2
    assert done.stderr.count(says.format(folder=tmp_path)) == 1, done.stderr
    assert not (tmp_path / "queued").exists()


def test_a_name_with_its_ending(tmp_path: Path) -> None:
    done = submit(tmp_path, "--cluster", "cpu-test.env", "--recipe", "cpu-test.args", *CHECKED, "--", "--mock-data")
    assert done.returncode == 0, done.stderr


def test_a_machine_without_gpus_is_told_so(tmp_path: Path) -> None:
    """Where nvidia-smi does not say it."""
    if list(Path("/dev").glob("nvidia[0-9]*")) or shutil.which("nvidia-smi"):
        pytest.skip("this machine may have a GPU")
    done = submit(tmp_path, "--cluster", "hgx-h100", "--recipe", "530m-98k", "--only-check", "1", "--", script="local.sh")
    assert (done.returncode, "needs a GPU, and this process sees none" in done.stderr) == (2, True), done.stderr
