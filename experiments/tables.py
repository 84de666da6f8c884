"""The tables of benchmarks/quality.py: read from the folders of its runs, merged, and written as CSV.

    curves.csv      run, iteration, loss (nats per byte), seconds of that iteration
    runs.csv        a row a run: see `run_row`
    sequences.csv   held-out loss of each sequence by position bucket: what pairs are made of
    passkey.csv     a row a run and cell
    passkey_by_question.csv   each question, whether it was answered right, and the right digit's log-probability (nats)
    hindsight.csv   what the selections of the checkpoint at the switch know of later tokens: a row a run and distance
    telemetry.csv   what selection did in the runs that log it: run, iteration, name of the scalar, value
    positions.csv   held-out loss by position bucket, and less that of the dense run of the same seed
    pairs.csv       each run less those that it is compared with: see quality_pairs.py
    quality.json    by run: arguments, command lines, versions, device, date; and the corpus
    work.tgz        what all of these were made from: `pack`

positions.csv and pairs.csv follow from the tables before them (quality_pairs.py). Imports no Megatron. Ours.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import statistics
import sys
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quality_runs import EXPERIMENTS, Run

from megatron_lighthouse.recipe import recovery

type Row = dict[str, Any]
TABLES = ("curves", "runs", "sequences", "passkey", "passkey_by_question", "hindsight", "telemetry")
PACKED = (
    "run.json",
    "train.log",
    *(f"{folder}/*.{kind}" for folder in ("evaluation", "hindsight") for kind in ("csv", "json")),
)
"""What is kept of each run, of the log its iterations alone; and its TensorBoard log, where telemetry is read from it."""
LINE = re.compile(r"iteration +(\d+)/ *\d+ \|.*? elapsed time per iteration \(ms\): ([^ ]+) \|.*? lm loss: ([^ ]+) \|")
"""An iteration in Megatron's log."""
STARTED = "===== benchmarks/quality.py starts a process\n"


@dataclass
class Results:
    """What is known of some runs."""

    tables: dict[str, list[Row]] = field(default_factory=lambda: {name: [] for name in TABLES})
    facts: Row = field(default_factory=dict)
    """quality.json."""

    @property
    def runs(self) -> dict[str, Run]:
        """Those of the experiment."""
        return EXPERIMENTS[self.facts["experiment"]].runs

    def of(self, table: str, run: str) -> list[Row]:
        return [row for row in self.tables[table] if row["run"] == run]

    def losses(self, run: str) -> dict[int, float]:
        return {row["iteration"]: row["loss"] for row in self.of("curves", run)}


def curve(log: str) -> list[Row]:
    """The iterations in a log of Megatron, in which a line STARTED stands before what each process wrote.

    Where a run was started again, its later iterations count. What Megatron logs of a process's second iteration is the mean
    over the first two, so it is taken apart here.
    """
    rows: dict[int, Row] = {}
    for part in log.split(STARTED):
        found = [(int(i), float(loss), float(ms) / 1000) for i, ms, loss in LINE.findall(part)]
        if len(found) > 1:
            (_, first_loss, first_seconds), (second, loss, seconds) = found[:2]
            found[1] = (second, 2 * loss - first_loss, 2 * seconds - first_seconds)
        if found:
            rows = {i: row for i, row in rows.items() if i < found[0][0]}
        rows |= {i: {"iteration": i, "loss": round(loss, 6), "seconds": round(seconds, 4)} for i, loss, seconds in found}
    return list(rows.values())


def stages(facts: Row, points: Sequence[Row]) -> dict[str, list[float]]:
    """The seconds of the iterations of each stage. `facts` has the switch: run.json, or a row of runs.csv."""
    found: dict[str, list[float]] = {"lighthouse": [], "return": [], "dense": []}
    for point in points:
        i = point["iteration"]
        found["lighthouse" if i <= facts["switch"] else "return" if i < facts["dense_from"] else "dense"].append(
            point["seconds"]
        )
    return found


def median(times: Sequence[float]) -> float | None:
    """Of the second half: in the first, iterations compile, and the evaluation of the run before may use the GPU."""
    return statistics.median(times[len(times) // 2 :]) if times else None


def steady(facts: Row, points: Sequence[Row]) -> list[float]:
    """[iterations] the seconds of each iteration, replaced by the `median` of its stage."""
    return [seconds for times in stages(facts, points).values() for seconds in [median(times) or 0.0] * len(times)]


def run_row(facts: Row, points: Sequence[Row], evaluation: Row | None) -> Row:
    """A run's row of runs.csv.

    Seconds are of the training loop as Megatron logs them: without start-up, checkpoints and evaluation, but with whatever
    the first iterations of a process compile. Steady seconds are without that too: the sum of `steady`.
    Tokens per second are those of the `median` of each stage. Recovery is as megatron_lighthouse.recipe.recovery
    measures it, here from Megatron's log: a process that is killed takes the last minutes of its TensorBoard log with it.

    Args:
        facts: the run's run.json.
        points: its part of curves.csv.
        evaluation: evaluation.json of its last checkpoint, where there is one.
    """
    switch, dense_from, times = facts["switch"], facts["dense_from"], stages(facts, points)
    last = [point["loss"] for point in points[-facts["smooth"] :]]
    answer: Row = {name: facts[name] for name in ("run", "title", "seed", "ranks", "at_once", "steps", "switch", "dense_from")}
    answer |= {"smooth": facts["smooth"], "device": facts.get("device"), "gpu": facts.get("gpu")}
    answer |= {"iterations": len(points), "tokens": len(points) * facts["tokens"]}
    answer["seconds"] = round(sum(point["seconds"] for point in points), 2)
    answer["steady_seconds"] = round(sum(steady(facts, points)), 2)
    for name in ("lighthouse", "dense"):
        seconds = median(times[name])
        answer[f"tokens_per_second_{name}"] = round(facts["tokens"] / seconds, 1) if seconds else None
    answer["training_loss"] = statistics.fmean(last) if last else None
    loss, probe = ((evaluation or {}).get(name) or {} for name in ("loss", "passkey"))
    answer |= {"sequences": loss.get("sequences"), "held_out_loss": loss.get("mean")}
    answer["held_out_error"] = loss.get("standard_error")
    for filler in ("noise", "classic"):
        found = probe.get("fillers", {}).get(filler, {})
        for name in ("accuracy", "log_probability"):
            answer |= {f"{filler}_{name}": found.get(name), f"{filler}_{name}_error": found.get(f"{name}_standard_error")}
    found = {}
    if times["lighthouse"] and times["dense"]:
        losses = {point["iteration"]: point["loss"] for point in points}
        try:
            measured = recovery.measure(losses, switch, dense_from, facts["smooth"])
        except ValueError as error:
            print(f"{facts['run']}: recovery is left out: {error}", file=sys.stderr)
            measured = None
        found = (
            {}
            if measured is None
            else recovery.report(recovery.Run(losses, switch, dense_from, facts["tokens"]), measured, None, facts["smooth"])
        )
    for name in ("level", "scatter", "spike", "spike_iteration", "iterations_to_recover", "tokens_to_recover"):
        answer[name] = found.get(name)
    return answer


def from_work(work: Path) -> Results:
    """All that the runs in a --work folder have left by now, or in what `pack` kept of it.

    Raises:
        ValueError: a folder without runs, or with those of two experiments.
    """
    known = {path.parent.name: facts for path in sorted(work.glob("*/run.json")) if (facts := read_json(path))}
    if not known:
        raise ValueError(f"{work} has no RUN/run.json: give a --work folder, or work.tgz unpacked.")
    experiment, *others = sorted({facts["experiment"] for facts in known.values()})
    if others:
        raise ValueError(f"{work} has runs of {experiment} and of {', '.join(others)}: give a folder for each experiment.")
    results = Results(facts={"experiment": experiment, "corpus": read_json(work / "corpus.json") or {}, "runs": {}})
    for name in (name for name in results.runs if name in known):
        folder, facts = work / name, known[name]
        log, evaluation = folder / "train.log", read_json(folder / "evaluation" / "evaluation.json")
        points = curve(log.read_text(errors="replace")) if log.exists() else []
        found: dict[str, list[Row]] = {"curves": points, "runs": [run_row(facts, points, evaluation)]}
        if evaluation:  # it is written last
            facts["held_out"], facts["versions"] = evaluation["held_out"], facts["versions"] | evaluation["versions"]
            found["sequences"] = read_csv(folder / "evaluation" / "loss_by_sequence.csv")
            for table in ("passkey", "passkey_by_question"):
                found[table] = read_csv(folder / "evaluation" / f"{table}.csv")
        found["hindsight"] = read_csv(folder / "hindsight" / "hindsight.csv")
        if results.runs[name].telemetry and (folder / "tensorboard").is_dir():
            found["telemetry"] = telemetry(folder / "tensorboard")
        results.facts["runs"][name] = facts
        for table, rows in found.items():
            results.tables[table] += [{"run": name, **values} for values in rows]
    return results


def telemetry(folder: Path) -> list[Row]:
    """The measures of selection in a TensorBoard log, 'lighthouse/what/layer-N/which'."""
    from megatron_lighthouse.plots import read_scalars

    return [
        {"iteration": int(i), "name": name, "value": float(value)}
        for name, scalars in sorted(read_scalars(folder).items())
        if name.startswith("lighthouse/") and "/layer-" in name
        for i, value in zip(*scalars, strict=True)
    ]


def read(folder: Path) -> Results:
    """What quality_pairs.write wrote.

    Raises:
        ValueError: a folder without results.
    """
    facts = read_json(folder / "quality.json")
    if facts is None:
        raise ValueError(f"{folder} has no quality.json: give folders that benchmarks/quality.py was given as --out.")
    return Results({name: read_csv(folder / f"{name}.csv") for name in TABLES}, facts)


def merged(all_results: Iterable[Results]) -> Results:
    """The results of several machines in one. Of a run that two have, what the later one knows counts.

    Raises:
        ValueError: results that cannot be compared: of another experiment, length or corpus.
    """
    answer = Results(facts={"experiment": None, "corpus": {}, "runs": {}})
    for results in all_results:
        known = {**answer.facts["runs"], **results.facts["runs"]}
        for name in ("experiment", "tokens", "steps", "seq_length", "held_out"):
            values = {json.dumps(facts[name], sort_keys=True) for facts in known.values() if facts.get(name) is not None}
            if len(values) > 1:
                raise ValueError(f"runs of different {name} ({', '.join(sorted(values))}) do not compare: merge others.")
        answer.facts["experiment"] = results.facts["experiment"]
        for table in TABLES:
            later = {row["run"] for row in results.tables[table]}
            kept = [row for row in answer.tables[table] if row["run"] not in later]
            answer.tables[table] = sorted(kept + results.tables[table], key=lambda row: list(answer.runs).index(row["run"]))
        answer.facts["runs"] = {name: known[name] for name in answer.runs if name in known}
        answer.facts["corpus"] = results.facts["corpus"] or answer.facts["corpus"]
    return answer


def pack(work: Path, path: Path) -> None:
    """Keep in `path`, a .tgz, what all tables are made from, without checkpoints: `from_work` reads it, unpacked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(_replacing(path), "w:gz") as archive:
        logged = {name for one in EXPERIMENTS.values() for name, run in one.runs.items() if run.telemetry}
        logs = [f"{name}/tensorboard/*" for name in sorted(logged)]
        for pattern in ["corpus.json", *(f"*/{kept}" for kept in PACKED), *logs]:
            for file in sorted(work.glob(pattern)):
                if file.suffix == ".log":
                    lines = file.read_text(errors="replace").splitlines(keepends=True)
                    content = "".join(line for line in lines if line == STARTED or LINE.search(line)).encode()
                else:
                    content = file.read_bytes()
                member = tarfile.TarInfo(str(file.relative_to(work)))
                member.size, member.mtime = len(content), file.stat().st_mtime
                archive.addfile(member, io.BytesIO(content))
    os.replace(_replacing(path), path)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Written whole or not at all. A column that some rows lack is empty there."""
    with _replacing(path).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    os.replace(_replacing(path), path)


def write_json(path: Path, content: Row) -> None:
    """Written whole or not at all."""
    _replacing(path).write_text(json.dumps(content, indent=1) + "\n")
    os.replace(_replacing(path), path)


def read_json(path: Path) -> Row | None:
    """None where there is no file, or half of one, as a process that was killed may leave."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def read_csv(path: Path) -> list[Row]:
    """The rows, numbers as numbers, None for what is empty; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{name: _value(text) for name, text in row.items()} for row in csv.DictReader(file)]


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text or None


def _replacing(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")
