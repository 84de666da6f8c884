"""The collector, on logs as Megatron writes them: whole, cut short, missing and broken."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from matplotlib.colors import to_rgb

from megatron_lighthouse.plan import scaling_plots
from megatron_lighthouse.plan.__main__ import main

INFO = {"recipe": "530m-98k", "seq_length": 98304, "gpus": 1, "device": "h100", "vocab": 384}


def write(folder: Path, iterations: int, ms: float, gib: float | None, **info: object) -> None:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({**INFO, **info}))
    lines = []
    for i in range(1, iterations + 1):
        time = 9 * ms if i <= 3 else ms
        lines.append(
            f" [2026-11-24 10:00:00] iteration {i:8d}/      10 | elapsed time per iteration (ms): {time:.1f} | "
            f"learning rate: 1.0E-04 | lm loss: {6 - i / 10:.6E} | grad norm: 1.0 |"
        )
        if i == 2 and gib is not None:
            lines.append(f"[Rank 0] memory (MB) | allocated: 900.0 | max allocated: {gib * 1024:.2f} | reserved: 1 |")
    (folder / "node0.log").write_text("\n".join(lines))


def test_collect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs, out = tmp_path / "runs", tmp_path / "out"
    write(runs / "dense", 8, 4000.0, 75.8, attention="dense", context_parallel=1)
    write(runs / "ours-1", 8, 1000.0, 60.0, attention="lighthouse", context_parallel=1)
    write(runs / "ours-2", 8, 625.0, 31.0, attention="lighthouse", context_parallel=2, gpus=2)
    write(runs / "cut", 2, 1000.0, None, attention="lighthouse", context_parallel=4, gpus=4)
    (runs / "queued").mkdir()
    (runs / "queued" / "run.json").write_text(json.dumps({**INFO, "attention": "dense", "context_parallel": 4, "gpus": 4}))
    (runs / "broken").mkdir()
    (runs / "broken" / "run.json").write_text('{"attention": ')
    (runs / "poor").mkdir()
    (runs / "poor" / "run.json").write_text('{"attention": "dense", "gpus": 1}')
    assert main(["scaling", str(runs), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    with (out / "scaling.csv").open() as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert rows.keys() == {"dense", "ours-1", "ours-2", "cut", "queued", "broken", "poor"}
    ours = rows["ours-2"]
    assert float(ours["seconds_a_step"]) == 0.625
    assert float(ours["tokens_s_gpu"]) == pytest.approx(98304 / 0.625 / 2, abs=0.1)
    assert float(ours["efficiency"]) == pytest.approx(0.8, abs=1e-3)
    assert float(ours["peak_gib"]) == 31.0
    assert float(rows["dense"]["efficiency"]) == 1
    assert float(rows["dense"]["predicted_peak_gib"]) == pytest.approx(75.81, rel=0.1)
    assert float(rows["ours-1"]["predicted_tokens_s_gpu"]) == pytest.approx(99087, rel=0.15)
    assert rows["cut"]["tokens_s_gpu"] == rows["cut"]["peak_gib"] == rows["queued"]["iterations"].strip("0") == ""
    assert rows["queued"]["predicted_tokens_s_gpu"]
    for note in ("cut: 2 iterations", "queued: no log", "broken: run.json is no JSON", "poor: run.json lacks seq_length"):
        assert note in said
    assert said.startswith((out / "scaling.txt").read_text().rstrip())
    for name in ("throughput.png", "efficiency.png", "memory.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_a_run_that_cannot_be_keeps_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "odd", 8, 500.0, 10.0, attention="lighthouse", context_parallel=1, seq_length=1000, recipe="mine")
    assert main(["scaling", str(tmp_path / "odd"), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "--recipe 'mine' is none that the plan counts" in said
    assert "2000.0" in said


def test_each_start_warms_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Logs lie beside run.json or in logs/, one for each start of the run; a recipe of one's own brings its sizes along."""
    sizes = {"layers": 30, "hidden": 1024, "ffn": 1536, "heads": 8, "groups": 8, "head_dim": 128, "budget": 1536}
    ours = {"attention": "lighthouse", "context_parallel": 1}
    for name, more in (("known", {}), ("own", {"recipe": "mine", **sizes}), ("full", {"recompute": "full"})):
        write(tmp_path / name, 5, 500.0, 10.0, **ours, **more)
        (tmp_path / name / "logs").mkdir()
        text = (tmp_path / name / "node0.log").read_text()
        (tmp_path / name / "logs" / "7_1.log").write_text(text.replace(": 500.0", ": 600.0"))
    assert main(["scaling", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    with (tmp_path / "out" / "scaling.csv").open() as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    for row in rows.values():
        assert (row["iterations"], float(row["seconds_a_step"]), row["efficiency"]) == ("10", 0.55, "1.0")
    predicted = {name: float(row["predicted_tokens_s_gpu"]) for name, row in rows.items()}
    assert predicted["known"] == predicted["own"] > predicted["full"]


@pytest.mark.parametrize(("iterations", "step"), [(2, ""), (3, "3.0"), (4, "4.0"), (6, "5.0")])
def test_where_steps_are_few_the_third_counts(iterations: int, step: str, tmp_path: Path) -> None:
    write(tmp_path / "one", 1, 1000.0, 10.0, attention="dense", context_parallel=1)
    log = tmp_path / "one" / "node0.log"
    line = next(line for line in log.read_text().splitlines() if "elapsed time" in line)
    log.write_text("\n".join(line.replace("9000.0", f"{i}000.0") for i in range(1, iterations + 1)))
    main(["scaling", str(tmp_path / "one"), "--out", str(tmp_path / "out")])
    with (tmp_path / "out" / "scaling.csv").open() as file:
        assert next(csv.DictReader(file))["seconds_a_step"] == step


def test_one_bad_run_leaves_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Words for numbers, nulls, numbers that cannot be, a folder for a file: a note each, and the table of the rest."""
    runs, ours = tmp_path / "runs", {"attention": "lighthouse", "context_parallel": 1}
    write(runs / "good", 8, 1000.0, 60.0, **ours)
    write(runs / "words", 8, 1000.0, 60.0, **{**ours, "seq_length": "98304", "context_parallel": "1", "gpus": "1"})
    write(runs / "nulls", 8, 1000.0, 60.0, **dict.fromkeys((*INFO, *ours, "levels", "recompute", "dense_first")))
    write(runs / "zero", 8, 1000.0, 60.0, **ours, global_batch=0, budget=True, layers=30.5)
    write(runs / "list", 8, 1000.0, 60.0, **{**ours, "recipe": ["530m-98k"], "device": {}})
    (runs / "folder" / "run.json").mkdir(parents=True)
    write(runs / "logless", 8, 1000.0, 60.0, **ours)
    (runs / "logless" / "b.log").mkdir()
    write(runs / "latin", 8, 1000.0, 60.0, **ours)
    (runs / "latin" / "run.json").write_bytes(b'{"recipe": "\xe9"}')
    write(runs / "torn", 8, 1000.0, 60.0, **ours)
    with (runs / "torn" / "node0.log").open("a") as log:
        log.write(" iteration 9/ 10 | elapsed time per iteration (ms): . | lm loss: 5.2E")
    assert main(["scaling", str(runs), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    with (tmp_path / "out" / "scaling.csv").open() as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert len(rows) == 9
    for name in ("good", "zero", "torn"):
        assert (rows[name]["tokens_s_gpu"], rows[name]["efficiency"]) == ("98304.0", "1.0")
        assert rows[name]["predicted_tokens_s_gpu"] == rows["good"]["predicted_tokens_s_gpu"] != ""
    assert rows["words"]["tokens_s_gpu"] == rows["nulls"]["tokens_s_gpu"] == rows["list"]["tokens_s_gpu"] == ""
    assert rows["words"]["peak_gib"] == "60.0"
    for note in (
        "words: run.json: gpus is '1', not a whole number of at least 1: left out",
        "words: run.json lacks seq_length, context_parallel, gpus",
        "nulls: run.json: attention is None, not a name: left out",
        "nulls: run.json: dense_first is None, not a whole number of at least 0",
        "zero: run.json: global_batch is 0, not",
        "zero: run.json: budget is True, not",
        "folder: cannot be read (",
        "logless: cannot be read (",
        "latin: run.json is no JSON",
    ):
        assert note in said


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_out_must_be_a_folder(out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "run", 8, 1000.0, 60.0, attention="dense", context_parallel=1)
    (tmp_path / "file").write_text("mine")
    assert main(["scaling", str(tmp_path / "run"), "--out", str(tmp_path / out)]) == 2
    assert f"--out {tmp_path / out} cannot be written (" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_logs_that_cannot_be_trusted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A loss or a time that is no number, and GPUs that make no whole number of replicas: empty cells and a word."""
    runs, out = tmp_path / "runs", tmp_path / "out"
    for name, old, new in (
        ("nan", "lm loss: 5.200000E+00", "lm loss: NAN"),
        ("infinite", "lm loss: 5.200000E+00", "lm loss: inf"),
        ("zero", "(ms): 1000.0", "(ms): 0.0"),
        ("no-time", "(ms): 1000.0", "(ms): nan"),
        ("backwards", "(ms): 1000.0", "(ms): -3.0"),
    ):
        write(runs / name, 8, 1000.0, 60.0, attention="dense", context_parallel=1)
        log = runs / name / "node0.log"
        log.write_text(log.read_text().replace(old, new))
    write(runs / "odd", 8, 1000.0, 60.0, attention="dense", context_parallel=2, gpus=3)
    assert main(["scaling", str(runs), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    with (out / "scaling.csv").open() as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    for name in ("nan", "infinite"):
        assert rows[name]["last_loss"] == ""
        assert f"{runs / name}: the last loss in the log is {'nan' if name == 'nan' else 'inf'}: left out" in said
    for name in ("zero", "no-time", "backwards"):
        assert rows[name]["seconds_a_step"] == rows[name]["tokens_s_gpu"] == ""
    assert rows["odd"]["tokens_s_gpu"] == ""
    alike = ", ".join(str(runs / name) for name in ("backwards", "no-time", "zero"))
    assert f"{alike}: 5 of 5 step times in the log are no time above 0: left out" in said
    assert "gpus 3 is no multiple of the 2" in said


def test_lines_of_one_attention_have_colours_of_their_own() -> None:
    attentions = ["dense", "lighthouse", "lighthouse", "lighthouse", "wall", "wall"]
    found = scaling_plots.shades(attentions)
    assert len({*found}) == len(attentions)
    assert all(0 <= channel <= 1 for colour in found for channel in colour)
    assert found[0] == to_rgb(scaling_plots.COLOURS["dense"])
    reds = [colour[0] - colour[2] for colour in found[1:4]]
    assert min(reds) > 0  # all are Lighthouse's
