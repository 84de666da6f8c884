"""A wrong line is refused before queuing, and each remedy that the refusal names is enough: no second error follows.

What Megatron itself says of it then, is asked too.
"""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_lighthouse.launch import check
from megatron_lighthouse.launch import megatron as asked_megatron
from megatron_lighthouse.mcore.command_line import precision
from tests.mcore.harness import MODEL, TEXT, Processes, without
from tests.mcore.test_launch_check import GPUS, LLAMA
from tests.mcore.test_together import MAJOR
from tests.mcore.wrong_lines import RECOMPUTE, ROUNDS

NODES = ["--arch", "blackwell", "--nodes", "1", "--gpus-per-node", "8"]
"""One node, of which LLAMA's TP 2 x CP 4 take all GPUs."""


def line(words: str) -> list[str]:
    given = words.split()
    return [*without(LLAMA, *(word[1:] for word in given if word[0] == "!")), *(word for word in given if word[0] != "!")]


@pytest.mark.parametrize("name", ROUNDS)
def test_the_first_remedy_is_enough(name: str, megatron: None, capsys: pytest.CaptureFixture[str]) -> None:
    wrong, says, remedies = ROUNDS[name]
    assert check.main([*NODES, "--without-megatron", "--", *line(wrong)]) == 1
    assert says in (error := capsys.readouterr().err), error
    for words in remedies:
        assert check.main([*NODES, "--without-megatron", "--", *line(words)]) == 0, capsys.readouterr().err
        assert asked_megatron.problems(line(words), 8, MAJOR, {}, False) == []


def test_sizes_say_all_that_is_wrong_with_them(capsys: pytest.CaptureFixture[str]) -> None:
    """What the sizes that are offered settle is not said too, for it offers others; what they leave is."""
    assert check.main([*NODES, "--without-megatron", "--", *LLAMA, "--context-parallel-size", "3"]) == 1
    assert capsys.readouterr().err.count("\n  - ") == 1
    more = ["--context-parallel-size", "3", "--attention-dropout", "0.1"]
    assert check.main([*NODES, "--without-megatron", "--", *LLAMA, *more]) == 1
    assert "--attention-dropout 0.1 would drop whole windows" in capsys.readouterr().err


def test_a_remedy_that_sizes_change_is_said_beside_them(capsys: pytest.CaptureFixture[str]) -> None:
    """With what works on the sizes that are offered."""
    more = ["--context-parallel-size", "3", "--lighthouse-budget", "1000"]
    assert check.main([*NODES, "--without-megatron", "--", *LLAMA, *more]) == 1
    error = capsys.readouterr().err
    assert "use --context-parallel-size 2 or 4" in error
    assert "--lighthouse-budget 1000 must be a positive multiple of --lighthouse-tile-budget 128: use" in error


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--attention lighthous --lighthouse-levels 9", ["Did you mean lighthouse?", "use --lighthouse-levels 5"]),
        ("--data-path /no/where", ["--data-path and --mock-data are each", "--data-path /no/where has no"]),
        ("--num-query-groups 6 --tensor-model-parallel-size 4", ["must be a multiple of --num-query-groups 6: use"]),
    ],
)
def test_two_faults_are_said_in_one_round(words: str, says: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([*GPUS, "--without-megatron", "--", *LLAMA, *words.split()]) == 1
    error = capsys.readouterr().err
    assert [text in error for text in says] == [True] * len(says), error
    assert error.count("\n  - ") == len(says), error


def test_windows_too_wide_for_the_layout_are_fewer_levels(capsys: pytest.CaptureFixture[str]) -> None:
    """One rank would take them, and attend to 66 rows of 131,072."""
    own = [*GPUS, "--without-megatron", "--", *line("!--lighthouse-budget --global-batch-size 32")]
    assert check.main([*own, "--lighthouse-levels", "9"]) == 1
    error = capsys.readouterr().err
    assert "131072 must be a multiple of 524288: use --lighthouse-levels 5 " in error
    use = error.strip().partition(": use ")[2].rstrip(".").split()
    assert "--context-parallel-size" not in use
    assert check.main([*own, *use]) == 0, capsys.readouterr().err


def test_one_machine_is_offered_sizes_and_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    """As local.sh asks for it: no more GPUs than given, where fewer do."""
    own = [*NODES, "--runs-here", "now", "--without-megatron", "--", *LLAMA]
    assert check.main([*own, "--context-parallel-size", "3"]) == 1
    assert "= 6 must divide --gpus 8: use --context-parallel-size 2 or 4." in capsys.readouterr().err
    assert check.main(["--nodes", "1", "--gpus-per-node", "12", *own[6:]]) == 1
    assert "= 8 must divide --gpus 12: use " in (error := capsys.readouterr().err)
    assert "--gpus 8." in error
    assert check.main([*own, "--context-parallel-size", "8"]) == 1
    assert "--gpus 16 or 32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "right"),
    [
        ("--fp4-format e2m1", "use --fp8-format hybrid"),
        ("--fp8-format e4m3 --fp8-recipe mxfp8", "use --fp8-recipe blockwise, tensorwise or delayed"),
    ],
)
def test_formats_of_other_gpus(more: str, right: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([*NODES, "--without-megatron", "--", *LLAMA, *more.split()]) == 0
    capsys.readouterr()
    assert check.main([*GPUS, "--without-megatron", "--", *LLAMA, *more.split()]) == 1
    assert right in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "here", "right"),
    [
        ("mxfp8", (9, 0), "needs Blackwell's GPUs, of compute capability 10, and these are of 9.0: use --fp8-recipe blockwise"),
        ("mxfp8", (12, 0), "and these are of 12.0: use --fp8-recipe blockwise, tensorwise or delayed."),
        ("mxfp8", (10, 3), None),
        ("blockwise", (8, 9), "compute capability 9.0 or later, and these are of 8.9: use --fp8-recipe tensorwise or delayed."),
        ("delayed", (8, 9), None),
        (
            "delayed",
            (8, 0),
            "--fp8-format hybrid needs GPUs of compute capability 8.9 or later, and these are of 8.0: leave it",
        ),
        ("custom", (9, 0), None),
        ("delayed", (0, 0), None),
    ],
)
def test_recipes_of_other_gpus(recipe: str, here: tuple[int, int], right: str | None) -> None:
    found = [*precision.device_problems(Namespace(fp8="hybrid", fp4=None, fp8_recipe=recipe), *here)]
    assert len(found) == (right is not None)
    assert right is None or right in found[0]


def test_a_full_validation_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    """Of single sequences, which are what --eval-micro-batch-size is where it is not given."""
    more = ["--full-validation", "--multiple-validation-sets", "--split", "99,1,0"]
    assert check.main([*NODES, "--without-megatron", "--", *LLAMA, *more]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("attention", ["dense", "parallax", "wall"])
def test_ranks_may_be_more_than_key_value_heads(attention: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As Megatron has it; memory is counted of them too."""
    words = line(f"!--lighthouse-budget !--use-rope-scaling !--rope-scaling-factor --attention {attention}")
    words += "--num-query-groups 2 --tensor-model-parallel-size 4 --context-parallel-size 2".split()
    if attention == "wall":
        words = [*without(words, "--rotary-base"), "--position-embedding-type", "none"]
    assert check.main([*NODES, "--without-megatron", "--", *words]) == 0, capsys.readouterr().err


def test_modules_that_need_an_engine(capsys: pytest.CaptureFixture[str]) -> None:
    words = line(f"{RECOMPUTE} --recompute-granularity selective --transformer-impl local --no-rope-fusion")
    own = [*NODES, "--runs-here", "--without-megatron", "--", *words, "--recompute-modules"]
    assert check.main([*own, "mlp", "layernorm"]) == 1
    assert "--recompute-modules layernorm needs Transformer Engine" in capsys.readouterr().err
    check.main([*own, "mlp", "core_attn"])
    assert "--recompute-modules" not in capsys.readouterr().err


@pytest.mark.parametrize("words", ["--ffn-hidden-size 127", "--dataloader-type external"])
def test_what_the_check_let_pass_is_refused_by_the_run(words: str, tmp_path: Path) -> None:
    """It ended in the first step, or in Megatron's warm-up of its fusions"""
    run = Processes(tmp_path, 1, [*MODEL, *TEXT, *words.split()])
    assert run.wait() == [2]
    assert re.search(f"{words} (must be a multiple of 2|is for loaders)", run.log.read_text())
