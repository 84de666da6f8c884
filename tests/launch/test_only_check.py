"""--only-check of the scripts that queue jobs: what it says, and what it tells apart."""

from __future__ import annotations

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
