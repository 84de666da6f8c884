"""Logs that the recovery report must not judge by: losses that are not finite, holes, damaged files."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from megatron_lighthouse import notice
from megatron_lighthouse.plots import read_scalars
from megatron_lighthouse.recipe import recovery_log
from megatron_lighthouse.recipe.recovery import main

SWITCH = 20
LOSSES = {i: 6.0 if i == SWITCH + 1 else 5.0 - 0.02 * i for i in range(1, 41)}
"""The spike is over in the next iteration."""


def write(folder: Path, losses: dict[int, float], with_layers: bool = True) -> Path:
    """A log of one file; the file."""
    known = {*folder.glob("*tfevents*")}
    with SummaryWriter(str(folder)) as log:
        for iteration, loss in losses.items():
            log.add_scalar("lm loss", loss, iteration)
            if with_layers:
                log.add_scalar(recovery_log.LAYERS, 4 if iteration <= SWITCH else 0, iteration)
    (made,) = {*folder.glob("*tfevents*")} - known
    return made


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *more: str) -> str:
    """What the report says of a run that it does not judge, in one line and without leaving anything."""
    assert main([str(folder), "--smooth", "5", *more]) == 1
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert not (folder / "recovery.csv").exists()
    return error


def test_a_whole_log_is_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, LOSSES)
    assert main([str(tmp_path), "--smooth", "5"]) == 0
    assert "+1.3600 at iteration 21" in capsys.readouterr().out


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("at", [1, SWITCH, SWITCH + 1, 30, 40])
def test_a_loss_that_is_not_finite(at: int, value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, LOSSES | {at: value})
    assert f"{tmp_path}: not all losses are finite ({value} at iteration {at})" in refused(capsys, tmp_path)


def without(first: int, last: int) -> dict[int, float]:
    return {i: loss for i, loss in LOSSES.items() if not first <= i <= last}


@pytest.mark.parametrize(("first", "last"), [(18, 18), (16, 20), (20, 20), (21, 21), (21, 24), (30, 33)])
@pytest.mark.parametrize("every", [1, 3])
def test_a_hole(every: int, first: int, last: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 1-40, or of their threefold with the switch at 60, 61 or 62."""
    for at in range(every * SWITCH, every * SWITCH + every):
        folder = tmp_path / str(at)
        write(folder, {every * i: loss for i, loss in without(first, last).items()}, with_layers=False)
        begin = at + 1 if first == SWITCH + 1 else every * (first - 1) + 1
        assert f"no loss of iterations {begin} to " in refused(capsys, folder, "--switch", str(at))


def test_what_is_no_hole(tmp_path: Path) -> None:
    """One that is not measured by; a stage 2 that logs more rarely; a switch between two logged iterations."""
    whole = {"old": without(3, 9), "rare": {i: x for i, x in LOSSES.items() if i <= SWITCH or i % 4 == 0}}
    for name, losses in whole.items():
        write(tmp_path / name, losses)
        assert main([str(tmp_path / name), "--smooth", "5"]) == 0, name
    write(tmp_path / "between", {10 * i: loss for i, loss in LOSSES.items()}, with_layers=False)
    assert main([str(tmp_path / "between"), "--smooth", "5", "--switch", "207"]) == 0


def test_a_log_without_its_beginning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, without(1, 17))
    assert "iterations 1 to 17" in refused(capsys, tmp_path)
    assert main([str(tmp_path), "--smooth", "3"]) == 0


def test_the_dense_run_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "run", LOSSES)
    write(tmp_path / "nan", LOSSES | {39: math.nan}, with_layers=False)
    write(tmp_path / "hole", without(25, 30), with_layers=False)
    assert f"{tmp_path / 'nan'}: not all losses are finite" in refused(
        capsys, tmp_path / "run", "--dense", str(tmp_path / "nan")
    )
    assert f"{tmp_path / 'hole'}: the log has no loss of iterations 25 to 30" in refused(
        capsys, tmp_path / "run", "--dense", str(tmp_path / "hole")
    )


@pytest.mark.parametrize("part", [0.02, 0.3, 0.5, 0.51, 0.8, 0.999])
def test_a_flipped_byte(part: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Wherever it is: TensorBoard's own reader would leave out all that follows."""
    file = write(tmp_path, LOSSES)
    raw = bytearray(file.read_bytes())
    raw[int(part * len(raw))] ^= 0x10
    file.write_bytes(raw)
    assert f"{file} is damaged at byte " in refused(capsys, tmp_path)


def test_every_byte_of_a_record_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its length, the checksum of that, its content, the checksum of that."""
    file = write(tmp_path, LOSSES)
    raw = file.read_bytes()
    size = 16 + int.from_bytes(raw[:8], "little")  # of the first record, which names the format
    for place in range(size):
        file.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        assert f"{file} is damaged at byte 0 of" in refused(capsys, tmp_path)


def test_a_file_that_is_cut_short_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """As a process leaves it that is killed: what was written is right."""
    notice._say.cache_clear()
    file = write(tmp_path, LOSSES)
    file.write_bytes(file.read_bytes()[:-7])
    assert main([str(tmp_path), "--smooth", "5"]) == 0
    assert any(f"{file} ends within a record" in message for message in caplog.messages)


def test_what_is_no_event_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "events.out.tfevents.1"
    file.write_bytes(b"no events at all, but a text")
    assert f"{file} is damaged at byte 0" in refused(capsys, tmp_path)
    file.write_bytes(b"")
    assert "no TensorBoard log with training losses" in refused(capsys, tmp_path)


def test_what_a_run_logged_before_it_went_back_is_no_part_of_it(tmp_path: Path) -> None:
    """It was killed in iteration 30, and went on from 20 to 25."""
    write(tmp_path, dict.fromkeys(range(1, 31), 1.0))
    write(tmp_path, dict.fromkeys(range(21, 26), 2.0))
    steps, values = read_scalars(tmp_path)["lm loss"]
    assert dict(zip(steps.tolist(), values.tolist(), strict=True)) == {i: 1.0 if i <= 20 else 2.0 for i in range(1, 26)}
