"""The recovery report: its measures on curves made by hand, and the logs that it understands."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from megatron_lighthouse.mcore.command_line.settings import add_arguments
from megatron_lighthouse.mcore.loop import switch
from megatron_lighthouse.recipe import recovery, recovery_log
from megatron_lighthouse.recipe.recovery import Recovery, caught_up, gap, main, measure, smoothed
from megatron_lighthouse.recipe.recovery_log import read_run
from megatron_lighthouse.recipe.whole_log import width_of


def curve(*losses: float, start: int = 1, step: int = 1) -> dict[int, float]:
    return {start + step * n: loss for n, loss in enumerate(losses)}


def test_smoothed() -> None:
    assert smoothed(curve(4.0, 2.0, 3.0, 7.0), 3) == {1: 4.0, 2: 3.0, 3: 3.0, 4: 4.0}
    assert smoothed(curve(4.0, 2.0), 1) == {1: 4.0, 2: 2.0}


SPIKE = curve(8.0, 3.0, 3.0, 5.0, 4.0, 3.0, 2.0, 2.0, 1.0)
"""Switches after iteration 3. In means of two: 3 before; 5, 4.5, 3.5, 2.5, 2, 1.5 after."""


def test_a_spike_and_the_way_back() -> None:
    assert measure(SPIKE, 3, 4, 2) == Recovery(3.0, 0.0, 2.0, 4, 7, 1.5, 9)
    assert measure(SPIKE, 3, 4, 1) == Recovery(3.0, 0.0, 2.0, 4, 6, 1.0, 9)


def test_no_mean_has_both_stages_in_it() -> None:
    """Else a run just after its switch would look recovered, or the level would hold the spike."""
    assert measure(curve(1.0, 1.0, 1.0, 9.0, 1.0), 3, 4, 3) == Recovery(1.0, 0.0, 8.0, 4, None, 5.0, 5)


def test_a_spike_that_grows() -> None:
    """Below the level before the spike is not back at it."""
    assert measure(curve(3.0, 3.0, 2.0, 6.0, 3.0, 3.0), 2, 3, 2) == Recovery(3.0, 0.0, 3.0, 4, 6, 3.0, 6)


def test_a_late_loss_is_no_spike() -> None:
    assert measure(curve(3.0, 4.0, 2.0, 2.0, 9.0), 1, 2, 2).spike == 1.0


def test_while_layers_become_dense_one_by_one() -> None:
    """The spike may come as late as the last of them, and W losses more."""
    losses = curve(3.0, 3.1, 3.2, 3.3, 5.0, 2.0, 9.0)
    assert measure(losses, 1, 4, 1).spike_iteration == 4
    assert measure(losses, 1, 4, 2).spike_iteration == 5


def test_without_a_spike_nothing_is_lost() -> None:
    assert measure(curve(4.0, 2.0, 2.5, 2.75), 2, 3, 2) == Recovery(3.0, 1.0, -0.25, 4, 2, 2.625, 4)


def test_iterations_that_were_logged_now_and_then() -> None:
    losses = curve(3.0, 3.0, 5.0, 4.0, 2.0, start=10, step=10)
    assert measure(losses, 25, 30, 1) == Recovery(3.0, 0.0, 2.0, 30, 50, 2.0, 50)


@pytest.mark.parametrize(("at", "message"), [(9, "stage 2 is missing"), (0, "stage 1 is missing")])
def test_one_stage_is_not_enough(at: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(SPIKE, at, at + 1, 2)


def test_gap_at_equal_iterations() -> None:
    dense = curve(7.0, 3.0, 3.0, 3.0, 3.0, 2.0, 2.0, 1.0)  # one iteration less
    assert gap(SPIKE, dense, 2) == (2.0 - 1.5, 1.5, 8)
    with pytest.raises(ValueError, match="no logged iteration in common"):
        gap(SPIKE, curve(1.0, start=50), 2)


def test_level_with_dense() -> None:
    """From the spike, in iteration 4, the differences are 2, 1, 0, -1, 0, 0: in means of two 2, 1.5, 0.5, -0.5."""
    dense = curve(9.0, 9.0, 9.0, 3.0, 3.0, 3.0, 3.0, 2.0, 1.0)
    assert caught_up(SPIKE, dense, 4, 2) == 7
    assert caught_up(SPIKE, dense, 4, 1) == 6
    assert caught_up(SPIKE, dense, 4, 9) is None
    assert caught_up(SPIKE, curve(0.5, start=9), 4, 2) is None


def test_level_with_dense_from_the_first_whole_mean() -> None:
    """A mean of fewer losses than all others would be one lucky loss."""
    same = curve(*[2.0] * 7)
    assert [caught_up(same, same, 4, width) for width in (1, 2, 4, 5)] == [4, 5, 7, None]


def write(
    folder: Path,
    losses: dict[int, float],
    layers: dict[int, int] | None = None,
    at: int | None = None,
    warmup: int | None = None,
) -> None:
    sizes = {"seq_length": 64, "global_batch_size": 2}
    with SummaryWriter(str(folder)) as log:
        for name, value in {**sizes, recovery_log.STAGE2_AT: at, recovery_log.WARMUP: warmup}.items():
            log.add_text(name, str(value))
        for iteration, loss in losses.items():
            log.add_scalar("lm loss", loss, iteration)
        for iteration, count in (layers or {}).items():
            log.add_scalar(recovery_log.LAYERS, count, iteration)


def test_the_scalar_is_the_one_that_a_run_writes() -> None:
    assert recovery_log.LAYERS == switch.SCALAR


def test_the_argument_is_the_one_that_a_run_has() -> None:
    parser = add_arguments(argparse.ArgumentParser())
    assert getattr(parser.parse_args(["--lighthouse-stage2-at", "5"]), recovery_log.STAGE2_AT) == 5
    assert getattr(parser.parse_args(["--lighthouse-dense-warmup-iters", "5"]), recovery_log.WARMUP) == 5


def test_one_job(tmp_path: Path) -> None:
    layers = curve(4, 4, 4, 3, 1, 0, 0, 0, 0)
    write(tmp_path / "tensorboard", SPIKE, {**layers, 10: 0})  # of an iteration that failed
    run = read_run(tmp_path)
    assert (run.losses, run.switch, run.dense_from, run.tokens) == (SPIKE, 3, 6, 128)
    assert read_run(tmp_path / "tensorboard", switch=5).switch == 5


def test_a_switch_between_two_logged_iterations(tmp_path: Path) -> None:
    """The last logged one with Lighthouse is 4; the job says 5."""
    losses, layers = curve(3.0, 5.0, 3.0, start=4, step=4), curve(4, 0, 0, start=4, step=4)
    write(tmp_path / "one", losses, layers, at=5)
    run = read_run(tmp_path / "one")
    assert (run.switch, run.dense_from, run.tokens) == (5, 8, 128)
    row = recovery.report(run, measure(run.losses, run.switch, run.dense_from, 1), None, 1)
    assert (row["iterations_to_recover"], row["tokens_to_recover"]) == (7, 7 * 128)
    write(tmp_path / "two", {4: 3.0}, {4: 4}, at=100)  # stopped before; the job that went on was dense
    write(tmp_path / "two", {8: 5.0})
    assert read_run(tmp_path / "two").switch == 4


def test_a_named_switch_of_a_return_layer_by_layer(tmp_path: Path) -> None:
    """The last layer, which makes the spike, is dense from iteration 60 on."""
    layers = {i: 4 if i <= 40 else 4 - -(-4 * (i - 40) // 20) for i in range(1, 81)}
    write(tmp_path, {i: 6.0 if i == 60 else 3.0 for i in layers}, layers)
    for named in (None, 40):
        run = read_run(tmp_path, named)
        measured = measure(run.losses, run.switch, run.dense_from, 10)
        assert (run.switch, run.dense_from, measured.spike, measured.spike_iteration) == (40, 56, 3.0, 60)


def test_a_dense_warmup_is_no_part_of_stage_1(tmp_path: Path) -> None:
    """Dense to iteration 3, with Lighthouse to 6: neither is 3 a switch, nor are its losses in the level."""
    losses = curve(9.0, 9.0, 9.0, 4.0, 3.0, 3.0, 5.0, 3.0, 2.0)
    write(tmp_path, losses, curve(0, 0, 0, 4, 4, 4, 0, 0, 0))
    run = read_run(tmp_path)
    assert (run.losses, run.warmup, run.switch, run.dense_from) == (losses, 3, 6, 7)
    assert width_of(losses, 6, 10, 3)[0] == 3
    for width, level in ((2, 3.0), (3, 10 / 3), (9, 10 / 3)):
        found = measure(losses, 6, 7, width, run.warmup)
        assert (found.level, found.spike) == (pytest.approx(level), pytest.approx(5.0 - level))
    with pytest.raises(ValueError, match="no loss of iterations 4 to 4"):
        measure({i: x for i, x in losses.items() if i != 4}, 6, 7, 3, run.warmup)
    with pytest.raises(ValueError, match="stage 1 is missing"):
        measure(losses, 6, 7, 2, warmup=6)


def test_a_warmup_by_its_flag_and_by_all_that_was_logged(tmp_path: Path) -> None:
    """The flag says more than a scalar that was logged now and then, in whichever job; else the last zero counts."""
    rarely = {2: 0, 4: 4, 6: 4, 8: 0}
    write(tmp_path / "rare", SPIKE, rarely, at=6, warmup=3)
    assert read_run(tmp_path / "rare").warmup == 3
    write(tmp_path / "both" / "lighthouse", {i: SPIKE[i] for i in range(1, 7)}, {2: 0, 4: 4, 6: 4}, warmup=3)
    write(tmp_path / "both" / "dense", {i: SPIKE[i] for i in (7, 8, 9)})
    run = read_run(tmp_path / "both")
    assert (run.switch, run.warmup) == (6, 3)
    write(tmp_path / "again", SPIKE, curve(0, 4, 0, 0, 4, 4, 0, 0, 0))
    assert read_run(tmp_path / "again").warmup == 4
    write(tmp_path / "none", SPIKE, curve(4, 4, 4, 0, 0, 0, 0, 0, 0))
    assert read_run(tmp_path / "none").warmup == 0


def test_the_report_and_the_picture_of_a_dense_warmup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, curve(9.0, 9.0, 4.0, 3.0, 5.0, 3.0), curve(0, 0, 4, 4, 0, 0))
    assert main([str(tmp_path), "--smooth", "2"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "dense warm-up to 2 Lighthouse to iteration 4 all layers dense from 5 level before the switch 3.5000" in said
    assert (tmp_path / "recovery.png").stat().st_size > 0
    with (tmp_path / "recovery.csv").open() as table:
        assert [row["warmup"] for row in csv.DictReader(table)] == ["2"]


def test_a_warmup_alone_is_no_switch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, SPIKE, curve(0, 0, 0, 4, 4, 4, 4, 4, 4))
    assert main([str(tmp_path), "--smooth", "2"]) == 1
    assert "there is no loss after iteration 9, the last with Lighthouse" in capsys.readouterr().err


def test_a_named_switch_before_the_end_of_stage_1(tmp_path: Path) -> None:
    write(tmp_path, curve(8.0, 3.0, 3.0, 2.5), curve(4, 4, 4, 4))
    write(tmp_path, {i: x for i, x in SPIKE.items() if i > 3})
    run = read_run(tmp_path, 3)
    assert (run.losses, run.switch, run.dense_from) == (SPIKE, 3, 4)


@pytest.mark.parametrize("says", [True, False], ids=["with the scalar", "without it"])
def test_two_jobs_in_two_folders(says: bool, tmp_path: Path) -> None:
    first = {i: SPIKE[i] for i in (1, 2, 3)} | {4: 2.5}  # trained on past the checkpoint that stage 2 takes up
    write(tmp_path / "tensorboard" / "lighthouse", first, dict.fromkeys(first, 4) if says else None)
    write(tmp_path / "tensorboard" / "dense", {i: x for i, x in SPIKE.items() if i > 3})
    run = read_run(tmp_path)
    assert (run.losses, run.switch, run.dense_from) == (SPIKE, 3, 4)


def test_two_jobs_in_one_folder(tmp_path: Path) -> None:
    write(tmp_path, {i: SPIKE[i] for i in (1, 2, 3)}, curve(4, 4, 4))
    write(tmp_path, {i: x for i, x in SPIKE.items() if i > 3})
    run = read_run(tmp_path)
    assert (run.losses, run.switch, run.dense_from) == (SPIKE, 3, 4)


def test_a_log_that_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, SPIKE)
    assert main([str(tmp_path)]) == 1
    assert "does not say when layers became dense: add --switch ITER" in capsys.readouterr().err
    assert main([str(tmp_path / "nothing")]) == 1
    assert "no TensorBoard log with training losses" in capsys.readouterr().err


@pytest.mark.parametrize("attention", ["wall", "dense"])
@pytest.mark.parametrize("more", [[], ["--switch", "3"]], ids=["", "switch"])
def test_a_run_that_had_nothing_to_switch(
    attention: str, more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, SPIKE, dict.fromkeys(SPIKE, 0))
    with SummaryWriter(str(tmp_path)) as log:
        log.add_text("attention", attention)
    assert main([str(tmp_path), *more]) == 1
    assert f"is of --attention {attention} alone: none of its layers became dense, so no" in capsys.readouterr().err


@pytest.mark.parametrize("first", [("lighthouse", "None"), ("dense", "['megatron_lighthouse.mcore.spec', 'lighthouse']")])
def test_two_jobs_of_which_the_first_selected(first: tuple[str, str], tmp_path: Path) -> None:
    for (attention, spec), iterations in ((first, (1, 2, 3)), (("dense", "None"), (4, 5, 6))):
        write(tmp_path, {i: SPIKE[i] for i in iterations})
        with SummaryWriter(str(tmp_path)) as log:
            log.add_text("attention", attention, iterations[0] - 1)
            log.add_text("spec", spec, iterations[0] - 1)
    assert read_run(tmp_path, 3).switch == 3


def test_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "run", SPIKE, curve(4, 4, 4, 0, 0, 0, 0, 0, 0))
    write(tmp_path / "scratch", curve(7.0, 3.0, 3.0, 3.0, 3.0, 2.0, 2.0, 1.0, 0.5))
    assert main([str(tmp_path / "run"), "--dense", str(tmp_path / "scratch"), "--smooth", "2"]) == 0
    text = capsys.readouterr().out
    for line in (
        "+2.0000 at iteration 4\ndense's own, there       +0.0000",
        "back at the level after  4 iterations, 512 tokens",
        "level with dense after   not within the run",
        "1.5000 at iteration 9",
        "+0.7500 (which has 0.7500 at iteration 9)",
    ):
        assert line in text
    (row,) = csv.DictReader((tmp_path / "run" / "recovery.csv").open())
    assert (row["iterations_to_recover"], row["tokens_to_recover"], row["gap"]) == ("4", "512", "0.75")
    assert row["iterations_to_catch_up"] == ""
    assert (tmp_path / "run" / "recovery.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_shorter_than_the_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Means are of what its shorter stage has, and the report says so; a dense run is caught up with in such means."""
    write(tmp_path / "run", SPIKE, at=3)
    write(tmp_path / "dense", curve(9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0))
    assert main(["--run-folder", str(tmp_path / "run"), "--dense", str(tmp_path / "dense")]) == 0
    said = capsys.readouterr().out
    assert "means of 3 losses (not 10, as --smooth asks: stage 1 logged 3 in all, too few to tell a spike from noise)" in said
    assert "level with dense after   3 iterations" in said
    with (tmp_path / "run" / "recovery.csv").open() as table:
        (row,) = csv.DictReader(table)
    assert (row["smooth"], float(row["level"])) == ("3", pytest.approx(14 / 3))
    assert width_of(SPIKE, 3, 3) == (3, "")
    width, why = width_of(SPIKE, 7, 4)
    assert (width, "stage 2 logged 2 in all" in why) == (2, True)


@pytest.mark.parametrize(("text", "unit"), [("['corpus.txt']", "byte"), ("None", "token"), (None, "token")])
def test_the_picture_says_what_a_loss_is_of(
    text: str | None, unit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr(recovery, "draw", lambda *given: drawn.append(given[-1]))
    write(tmp_path, SPIKE, at=3)
    if text is not None:
        with SummaryWriter(str(tmp_path)) as log:
            log.add_text("text_data", text)
    assert main(["--run-folder", str(tmp_path)]) == 0
    assert drawn == [unit]
