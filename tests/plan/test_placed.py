"""A batch and a layout that are not given, or in part: what is chosen fits; where nothing does, what is offered."""

from __future__ import annotations

import re

import pytest

from megatron_lighthouse.plan import lengths, memory, numbers
from megatron_lighthouse.plan.__main__ import main
from megatron_lighthouse.plan.calibration import coefficients
from megatron_lighthouse.plan.device import DEVICES
from megatron_lighthouse.plan.models import run_of_model
from megatron_lighthouse.plan.placed import batches, placed
from megatron_lighthouse.plan.run import Run
from megatron_lighthouse.plan.stages import FRACTION, Stages

ASKED = "--model llama3-8b --tokens 20B".split()


def said(capsys: pytest.CaptureFixture[str], words: str) -> tuple[int, str, str]:
    status = main([*ASKED, *words.split()])
    return status, *capsys.readouterr()


def run_of_gpus(gpus: int, length: int = 2**17) -> Run:
    return run_of_model("llama3-8b", length, gpus=gpus, device=DEVICES["h200"])


@pytest.mark.parametrize(
    ("wanted", "gpus", "first"),
    [(32, 8, 32), (32, 24, 24), (32, 12, 36), (32, 7, 35), (32, 100, 25), (8, 64, 8), (8, 96, 6), (4, 40, 5), (1, 1, 1)],
)
def test_a_batch_near_what_is_wanted_that_the_gpus_share(wanted: int, gpus: int, first: int) -> None:
    found = list(batches(wanted, gpus))
    assert found[0] == first
    assert found[-1] % gpus == 0  # for one sequence a GPU
    assert found == sorted(found)


@pytest.mark.parametrize("gpus", [6, 7, 12, 24, 40, 100])
def test_any_number_of_gpus_has_a_batch_of_its_own(gpus: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Which the answer says, with the reason."""
    run = placed(run_of_gpus(gpus), coefficients(), FRACTION).recommended[0]
    assert run.gpus == gpus
    assert 2**21 <= run.global_batch * run.seq_length <= 2**23
    assert all(memory.fits(stage.check()) for stage in Stages(run).runs)
    if gpus == 24:
        status, out, _ = said(capsys, "--seq-length 128K --gpus 24 --device h200")
        assert (status, "24 sequences a step (3.1M tokens; chosen, for no --global-batch-size is given)" in out) == (0, True)
        assert "chosen" not in said(capsys, "--seq-length 128K --gpus 24 --device h200 --global-batch-size 48")[1]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("--recompute full", "layout: .*, recompute full, 8 sequences a step"),
        ("--cp-comm-type a2a", r"layout: TP \d CP \d a2a PP"),
        ("--cp-comm-type all_gather", r"layout: TP \d CP \d all_gather PP"),
        ("--context-parallel-size 4", r"layout: TP \d CP 4 "),
        ("--context-parallel-size 1 --pipeline-model-parallel-size 1", "layout: TP 8 CP 1 PP 1 DP 8,"),
    ],
)
def test_the_given_part_of_a_layout_is_held_and_the_rest_is_found(
    given: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, error = said(capsys, f"--seq-length 512K --gpus 64 {given}")
    assert (status, error) == (0, "")
    assert re.search(line, out)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--seq-length 128K --gpus 24 --device h200 --global-batch-size 32", "32 sequences .* use --global-batch-size 24"),
        ("--seq-length 128K --gpus 8 --tensor-model-parallel-size 3", "--tensor-model-parallel-size 3 must divide"),
        ("--seq-length 128K --gpus 24 --context-parallel-size 16", "--gpus 24 must be a multiple of"),
        ("--seq-length 1M --gpus 8 --context-parallel-size 1 --recompute none", "--recompute full in place of none"),
    ],
)  # fmt: skip
def test_where_nothing_fits_what_was_given_is_changed(words: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, error = said(capsys, words)
    assert (status, out) == (2, "")
    assert re.search(says, error)


@pytest.mark.parametrize(
    "words", ["--seq-length 1M --gpus 1", "--seq-length 2M --gpus 8 --device h100", "--seq-length 512K --gpus 3 --device h100"]
)
def test_what_is_offered_fits_and_is_near(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """No length of a tenth where more GPUs will do, and never a longer one."""
    status, out, error = said(capsys, words)
    assert (status, out) == (2, "")
    offered = re.findall(r"(--(?:gpus|seq-length)) (\d+)(?=,|\.$)", error.strip().split(": use ")[1])
    assert offered
    asked = numbers.length(words.split()[1])
    for flag, value in offered:
        assert said(capsys, f"{words} {flag} {value}")[0] == 0
        assert flag != "--seq-length" or asked / 2 <= int(value) < asked


@pytest.mark.parametrize("words", [
    "--model llama3-8b --seq-length 512K --gpus 64 --global-batch-size 64 --tensor-model-parallel-size 1 "
    "--context-parallel-size 1 --pipeline-model-parallel-size 1 --recompute none",
    "--recipe 530m-98k --seq-length 1M --gpus 1",
    "--recipe llama3-8b-128k --seq-length 1M --device h100 --details",
])  # fmt: skip
def test_nothing_that_does_not_fit_has_a_headline(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    out, error = capsys.readouterr()
    assert "GPU-hours" not in out + error
    assert re.match(r"DOES NOT FIT: .* needs [\d.]+ GiB of a GPU|--gpus 64, .*refused: \d by memory", error)
    assert ": use --" in error
    assert ("memory per GPU" in error) == ("--details" in words)


@pytest.mark.parametrize(
    ("words", "use"),
    [
        ("--nodes 8", "8 to a node of HGX B200 180GB: use --gpus 64."),
        ("--nnodes 4 --device gb200", "4 to a node of GB200 186GB: use --gpus 16."),
        ("--num-gpus 64", "--num-gpus is not a known flag: use --gpus."),
    ],
)
def test_gpus_by_other_names(words: str, use: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Left out, as a flag that is not known may be, eight GPUs would be planned."""
    try:
        status = main([*ASKED, *words.split()])
    except SystemExit as ended:
        status = int(str(ended))
    assert status == 2
    assert use in capsys.readouterr().err


def test_a_recipe_takes_a_batch_that_its_gpus_share(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("--recipe 530m-98k --gpus 12".split()) == 0
    assert "12 sequences a step (1.2M tokens; chosen" in capsys.readouterr().out
    assert main("--recipe 530m-98k".split()) == 0
    assert "8 sequences a step\n" in capsys.readouterr().out


@pytest.mark.parametrize(("gpus", "multiple"), [(6, 3), (7, 7), (12, 3), (24, 3)])
def test_the_longest_context_of_gpus_that_are_no_power_of_two(gpus: int, multiple: int) -> None:
    """They share multiples of their odd part, which are apart: at least half of what a power of two below them holds."""
    run, power = run_of_gpus(gpus), 2 ** (gpus.bit_length() - 1)
    found, part = lengths.of_gpus(run), lengths.of_gpus(run.change(gpus=power))
    assert found
    assert part
    assert 2 * found.seq_length > part.seq_length
    assert found.seq_length % multiple == 0
    assert all(memory.fits(stage.check()) for stage in Stages(found).runs)
