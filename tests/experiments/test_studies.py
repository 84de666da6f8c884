"""Studies of one attention throughout: what is evaluated how, tables by hand, and runs that end in time."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from experiments import bench, plots, tables
from experiments.__main__ import main
from experiments.commands import Commands
from experiments.runs import EXPERIMENTS, Size
from experiments.study_table import study_table
from experiments.tables import Results, Row
from tests.experiments.by_hand import facts
from tests.mcore.forks import warm

SLOW_TO_END = """
import pathlib, signal, sys, time
def save(*_):
    pathlib.Path(sys.argv[1]).parent.mkdir(exist_ok=True)
    pathlib.Path(sys.argv[1]).write_text("7")
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(60)
"""


def test_each_is_evaluated_by_its_own_attention_and_length() -> None:
    commands = Commands(Size("wall", 2048, 10, 8), [], [], [], [])
    runs = EXPERIMENTS["wall"].runs
    for name, attention in (("wall", "wall"), ("nope", "dense")):
        command = commands.evaluation(runs[name], Path("run"), Path("corpus"))
        values = {flag: command[i + 1] for i, flag in enumerate(command) if flag.startswith("--") and i + 1 < len(command)}
        assert (values["--attention"], values["--position-embedding-type"]) == (attention, "none")
        assert (values["--seq-length"], values["--max-position-embeddings"]) == ("32768", "32768")
    recipe = Commands(Size("recipe", 32768, 10, 2), [], [], [], [])
    for name in ("dense", "norm-60"):
        command = recipe.evaluation(EXPERIMENTS["recipe"].runs[name], Path("run"), Path("corpus"))
        assert command[command.index("--attention") + 1] == "dense"
        assert command.count("--seq-length") == 1


def by_hand(run: str, losses: list[list[float]]) -> Results:
    """Trained at two tokens, evaluated at four: buckets 0, 1 and 2-3."""
    known: Row = {**facts("dense"), "run": run, "experiment": "wall", "seq_length": 2, "evaluated": 4}
    found = Results(facts={"experiment": "wall", "corpus": {}, "runs": {run: known}})
    found.tables["curves"] = [{"run": run, "iteration": 1, "loss": 3.0, "seconds": 1.0}]
    row: Row = {"run": run, "title": run, "iterations": 5, "steps": 5, "tokens": 2e6, "at_once": 4, "training_loss": 1.5}
    row |= {"held_out_loss": 2.0, "seed": 1, "switch": 0, "dense_from": 1, "smooth": 1, "iterations_to_recover": None}
    found.tables["runs"] = [row]
    names = ("run", "starts_at", "document", "0", "1", "2")
    found.tables["sequences"] = [dict(zip(names, (run, 4 * i, i, *x), strict=True)) for i, x in enumerate(losses)]
    return found


def test_tables_by_hand(tmp_path: Path) -> None:
    """Up to the length that was trained (3 + 1) / 2, (3 + 3) / 2; after it 5 and 4. Less those of dense: -1, -3 and 1, 3."""
    dense, ours = by_hand("dense", [[3.0, 1.0, 5.0], [3.0, 3.0, 4.0]]), by_hand("wall", [[2.0, 0.0, 6.0], [0.0, 0.0, 7.0]])
    both = tables.merged([dense, ours])
    lines = study_table(both).splitlines()
    assert lines[2] == "| `dense`: dense | 2.0 | 1.5000 | 2.0000 |  |"
    # of all four positions 0 and 0
    assert lines[3] == "| `wall`: wall | 2.0 | 1.5000 | 2.0000 | +0.0000 ± 0.0000 (`dense`) |"
    assert lines[5:] == [
        "| positions | 0 to 1 | 2 to 3 |",
        "| --- | --- | --- |",
        "| `dense` | 2.5000 | 4.5000 |",
        "| `wall` | 0.5000 (-2.0000 ± 1.0000) | 6.5000 (+2.0000 ± 1.0000) |",
    ]
    plots.draw(both, tmp_path)
    assert (tmp_path / "table.md").read_text() == study_table(both)
    assert (tmp_path / "positions.png").stat().st_size > 0


def test_runs_end_in_time_and_are_no_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told to end, a run saves; what would begin then does not, and the status says that the command goes on."""
    (tmp_path / "corpus" / "train").mkdir(parents=True)
    (tmp_path / "corpus" / "train" / "1.txt").write_text("text")
    monkeypatch.setattr(bench, "START", time.monotonic())
    monkeypatch.setattr(
        Commands,
        "training",
        lambda self, run, folder, corpus: [
            sys.executable,
            "-c",
            SLOW_TO_END,
            str(folder / "checkpoints" / "latest_checkpointed_iteration.txt"),
        ],
    )
    paths = [f"--{name}={tmp_path / name}" for name in ("corpus", "work", "out")]
    given = ["--experiment", "parallax", "--runs", "dense", "parallax", *paths, "--steps", "10", "--within"]
    assert main([*given, str(bench.ENDING + 2)]) == bench.CUT_OFF
    said = capsys.readouterr().out
    assert "not finished after 42 s: dense, parallax; the same command goes on" in said
    assert "failed" not in said
    assert "parallax: training" in said
    assert "ready" in (tmp_path / "work" / "dense" / "train.log").read_text()
    assert (tmp_path / "work" / "dense" / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "7"
    assert not (tmp_path / "work" / "parallax" / "train.log").exists()
    assert not (tmp_path / "work" / "dense" / "evaluation.log").exists()


@pytest.mark.slow
def test_wall_is_trained_and_read_beyond_its_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("train", "held-out"):
        (tmp_path / "corpus" / part).mkdir(parents=True)
        (tmp_path / "corpus" / part / "1.txt").write_text(f"{part} text, over and over. " * 300)
    monkeypatch.setattr(bench, "START", time.monotonic())
    for name, value in warm().items():
        monkeypatch.setenv(name, value)
    paths = [f"--{name}={tmp_path / name}" for name in ("corpus", "work", "out")]
    sizes = "--steps 10 --seq-length 64 --batch 2 --loss-sequences 3 --num-layers 2 --hidden-size 64 --ffn-hidden-size 64"
    assert main(["--experiment", "wall", "--runs", "wall", *paths, *sizes.split()]) == 0
    rows = tables.read_csv(tmp_path / "out" / "positions.csv")
    assert [row["stop"] for row in rows][-5:] == [64, 128, 256, 512, 1024]
