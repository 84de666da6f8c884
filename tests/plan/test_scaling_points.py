"""benchmarks/scaling_points.py: what the study on 2, 4 and 8 GPUs would run can run, and is what the plan predicts."""

from __future__ import annotations

import csv
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_lighthouse.launch import check
from megatron_lighthouse.mcore.command_line.settings import settings_from

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import scaling_predicted
from scaling_points import MACHINES, SIZES, STAGES, Point, all_candidates, points

ROOT = Path(__file__).parents[2]
RENEW = "run benchmarks/scaling_predicted.py"
RUN = list(dict.fromkeys(point for machine in MACHINES for gpus in SIZES for point in points(gpus, machine)))


DATA = ["--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "384"]


def recipe(name: str) -> list[str]:
    lines = (ROOT / "launch/recipes" / f"{name}.args").read_text().splitlines()
    return [word for line in lines for word in line.split("#")[0].split()]


def words(point: Point) -> list[str]:
    """What launch/local.sh makes of it."""
    length = str(point.seq_length)
    own = ["--attention", point.attention, "--seq-length", length, "--max-position-embeddings", length]
    more = ["--global-batch-size", "1", *point.arguments.split(), *own, "--context-parallel-size", str(point.context_parallel)]
    return [*recipe("530m-98k"), *DATA, "--train-iters", "4", *more]


def test_every_point_can_start(capsys: pytest.CaptureFixture[str]) -> None:
    for point in RUN:
        one = ["--exact", "--nodes", "1", "--gpus-per-node", str(point.gpus), "--", *words(point)]
        assert check.main(one) == 0, capsys.readouterr().err
        assert f"{point.gpus} ranks = TP {point.tensor_parallel} x CP {point.context_parallel} x" in capsys.readouterr().out


def test_the_plan_knows_the_point_that_runs() -> None:
    for point in RUN:
        args, run = check.parse(words(point)), point.run
        assert args.global_batch_size == run.global_batch
        assert args.pipeline_model_parallel_size == run.pipeline_parallel
        assert (args.cp_comm_type or ["p2p"]) == [run.cp_comm_type]
        if point.attention == "lighthouse":
            settings = settings_from(args)
            assert settings.config == run.config
            assert (args.lighthouse_dense_first, args.lighthouse_dense_last) == (run.model.dense_first, run.model.dense_last)


def test_a_million_tokens_is_the_recipe() -> None:
    """But for what the study sets: the data, and how long it trains; on fewer than eight GPUs also ranks and recomputation."""
    theirs = recipe("530m-1m")
    free = {"--train-iters", "--cp-comm-type", "--high-priority-stream-groups"}
    fewer = {"--context-parallel-size", "--recompute-granularity", "--recompute-modules"}
    for machine in MACHINES:
        given = words(next(p for p in points(machine, machine) if p.folder == "1m"))
        last = {name: value for name, value in zip(given, [*given[1:], ""], strict=True) if name.startswith("--")}
        for name, value in zip(theirs, [*theirs[1:], ""], strict=True):
            if name.startswith("--") and name not in (free if machine == 8 else free | fewer):
                assert last[name] == value or value.startswith("--"), name
        assert last["--context-parallel-size"] == str(machine)


def test_points_do_not_share_a_folder() -> None:
    names = [(p.folder, p.attention, p.seq_length, p.context_parallel) for p in all_candidates()]
    assert len(names) == len(set(names))


def test_all_that_the_issue_asks_for_is_there() -> None:
    """Or left out with a reason."""
    asked = {(a, n * 1024, c) for a in ("lighthouse", "dense") for n in (256, 512, 1024) for c in (1, 2, 4, 8)}
    study = {(p.attention, p.seq_length, p.context_parallel): p for p in all_candidates() if p.folder == "study"}
    assert asked <= study.keys()
    for machine in MACHINES:
        apart, half = [p for p in points(machine, machine) if p.folder in ("tp2", "pp2")], machine // 2
        assert {(p.tensor_parallel, p.context_parallel, p.pipeline_parallel) for p in apart} == {(2, half, 1), (1, half, 2)}
        assert {p.cp_comm_type for gpus in SIZES for p in points(gpus, machine)} == {"p2p", "all_gather", "a2a"}
        million = points(machine, machine, "million")
        assert [(p.attention, p.dense) for p in million] == [*(("lighthouse", n) for n in (0, 1, 2)), ("dense", 2)]
        for gpus in SIZES:
            staged = [p for stage in STAGES for p in points(gpus, machine, stage)]
            assert staged == points(gpus, machine)
    huge = study["dense", 1024 * 1024, 1]
    assert "GiB" in (huge.left_out or "")
    assert "trains for" in (study["dense", 1024 * 1024, 8].left_out or "")
    assert replace(study["dense", 1024 * 1024, 8], wanted=True).left_out is None


def rows_of(table: Path) -> list[dict[str, str]]:
    with table.open() as file:
        return list(csv.DictReader(file))


def last_digit(number: float) -> float:
    """One in the last of the four digits to which tables are written: what another BLAS may round otherwise."""
    return 1.01 * 10.0 ** (math.floor(math.log10(abs(number))) - 3) if number else 0.0


def test_the_predictions_are_the_plan_s_and_the_docs_quote_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    monkeypatch.setattr("matplotlib.figure.Figure.suptitle", lambda _, text, **__: said.append(text))
    monkeypatch.setattr(sys, "argv", ["scaling_predicted.py", "--out", str(tmp_path)])
    scaling_predicted.main()
    files = [tmp_path / name for name in ("attention.csv", "training.csv", "predicted.png")]
    assert f"written: {', '.join(map(str, files))}\n" in capsys.readouterr().out
    assert all(file.is_file() for file in files)
    kept = ROOT / "benchmarks" / "results" / "scaling" / "predicted"
    tables = {name: rows_of(tmp_path / f"{name}.csv") for name in ("training", "attention")}
    devices = {row["measured_on"].upper() for rows in tables.values() for row in rows if row["measured_on"]}
    assert set(re.findall(r"\b([A-Z]+\d+)s\b", said[0])) == devices
    for name, rows in tables.items():
        for row, before in zip(rows, rows_of(kept / f"{name}.csv"), strict=True):
            numbers = {key: float(value) for key, value in row.items() if re.fullmatch(r"[\d.e+-]+", value)}
            for key, value in numbers.items():
                assert value == pytest.approx(float(before[key] or "nan"), rel=0, abs=last_digit(value)), (row, key, RENEW)
            assert {k: v for k, v in row.items() if k not in numbers} == {k: before[k] for k in row if k not in numbers}, RENEW

    def training(folder: str, ranks: int, length: int = 2**20, attention: str = "lighthouse") -> dict[str, str]:
        key = (folder, str(ranks), str(length), attention)
        names = ("folder", "context_parallel", "N", "attention")
        return next(row for row in tables["training"] if tuple(row[name] for name in names) == key)

    def layer(case: str, ranks: int) -> str:
        found = next(r for r in tables["attention"] if (r["case"], r["ranks"], r["scheme"]) == (case, str(ranks), "p2p"))
        return f"| {float(found['efficiency']):.0%} |"

    def steps(ranks: int) -> tuple[float, list[float], list[float]]:
        runs = [training(folder, ranks) for folder in ("1m", "1m-one-dense", "1m-all-layers")]
        seconds = [float(row["seconds_a_step"]) for row in runs]
        dense = float(training("1m", ranks, attention="dense")["seconds_a_step"])
        return dense, seconds, [float(row["times_dense"]) for row in runs]

    rows = [layer("1M-L3", 8), layer("1M", 8), layer("512K", 4)]
    rows += [f"| {float(training('study', *at)['efficiency']):.0%}" for at in ((8,), (8, 2**18), (4, 2**19))]
    dense, seconds, times = steps(8)
    rows += [f"| {dense:.1f} → {seconds[0]:.1f} s, {times[0]:.1f}× |", f"| {seconds[1]:.1f} s, {times[1]:.1f}× |"]
    rows += [f"| {seconds[2]:.2f} s, {times[2]:.0f}× |"]
    dense, seconds, times = steps(4)
    faster = f"{times[0]:.1f}, {times[1]:.1f}, {times[2]:.0f}×"
    rows.append(f"| {dense:.0f} → {seconds[0]:.1f}, {seconds[1]:.1f}, {seconds[2]:.2f} s: {faster} |")
    text = (ROOT / "docs" / "scaling.md").read_text().replace("**", "")
    assert [row for row in rows if row not in text] == []


def test_the_docs_quote_what_four_gpus_did() -> None:
    """The tables of docs/scaling.md, from the results."""
    kept = ROOT / "benchmarks" / "results" / "scaling" / "4-gpus"
    found = {
        (folder, row["attention"], int(row["seq_length"]), int(row["context_parallel"])): float(row["seconds_a_step"])
        for folder in ("study", "1m", "1m-one-dense", "1m-all-layers")
        for row in rows_of(kept / folder / "scaling.csv")
    }

    def speed(attention: str, length: int, ranks: int) -> float:
        return length / found["study", attention, length, ranks] / ranks

    def digits(number: float) -> str:
        return f"{number:#.3g}".rstrip(".")

    def shown(attention: str, length: int, ranks: int) -> str:
        """Tokens/s a GPU to three digits, and over one GPU where that was measured."""
        number = float(f"{speed(attention, length, ranks):.3g}")
        alone = f", {speed(attention, length, ranks) / speed(attention, length, 1):.1%}" if ranks > 1 else ""
        return f"{number:,.0f}{alone}"

    def over(length: int, ranks: int) -> str:
        return f"{speed('lighthouse', length, ranks) / speed('dense', length, ranks):.1f}×"

    million = 1 << 20
    dense, recipe = found["1m", "dense", million, 4], found["1m", "lighthouse", million, 4]
    one, none = (found[folder, "lighthouse", million, 4] for folder in ("1m-one-dense", "1m-all-layers"))
    rows = [
        f"| dense | {dense:.1f} |",
        f"| {recipe:.1f} | {dense / recipe:.1f}× |",
        f"| {one:.1f} | {dense / one:.1f}× |",
    ]
    log = (kept / "1m-all-layers" / "lighthouse-1048576-cp4" / "local.log").read_text()
    first, second, third = (float(ms) / 1000 for ms in re.findall(r"per iteration \(ms\): ([\d.]+)", log)[2:])
    assert first < second < third
    words = f"({first:.2f}, {second:.2f} and {third:.2f} in a row)"
    rows += [f"| {none:.1f} {words} | {dense / none:.0f}× ({dense / third:.0f} to {dense / first:.0f}) |"]
    for length in (1 << 18, 1 << 19):
        rows.append(f"| {length:,} tokens, Lighthouse |" if length == 1 << 18 else f"| {length:,}, Lighthouse |")
        rows[-1] += "".join(f" {shown('lighthouse', length, ranks)} |" for ranks in (1, 2, 4))
    rows.append("| … dense |" + "".join(f" {shown('dense', 1 << 18, ranks)} |" for ranks in (1, 2, 4)))
    rows.append("| … Lighthouse over dense |" + "".join(f" {over(1 << 18, ranks)} |" for ranks in (1, 2, 4)))
    rows.append(f"| {over(1 << 19, 4)} |")
    layers = {(row["case"], row["what"], int(row["ranks"])): row for row in rows_of(kept / "attention-4" / "times.csv")}
    names = {"128K": "131,072", "256K": "262,144", "512K": "524,288"}
    names |= {"1M": "1,048,576 (L = 4, k = 4096)", "1M-L3": "1,048,576 (L = 3, k = N/128)"}
    for case, name in names.items():
        one, *ours, dense = (
            float(layers[case, what, ranks]["fwd+bwd_ms"]) if (case, what, ranks) in layers else 0.0
            for what, ranks in (
                ("lighthouse", 1),
                *((f"lighthouse {scheme}", 4) for scheme in ("p2p", "all_gather", "a2a")),
                ("dense p2p", 4),
            )
        )
        efficiency = f"{float(layers[case, 'lighthouse p2p', 4]['efficiency']):.1%}"
        cells = [f"{digits(one)}{' ms' if case == '128K' else ''}", *map(digits, ours), efficiency]
        cells += [digits(dense), f"{dense / ours[0]:.0f}×"] if dense else ["", ""]
        rows.append(re.sub(" +", " ", f"| {name} | {' | '.join(cells)} |"))
    text = (ROOT / "docs" / "scaling.md").read_text().replace("**", "")
    assert [row for row in rows if row not in text] == []
