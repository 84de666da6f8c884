"""The tables of benchmarks/quality.py: read from the folders of its runs, merged, paired, and written as CSV.

    curves.csv      run, iteration, loss (nats per byte), seconds of that iteration
    runs.csv        a row a run: see `run_row`
    sequences.csv   held-out loss of each sequence by position bucket: what pairs are made of
    passkey.csv     a row a run and cell
    positions.csv   held-out loss by position bucket, and less that of the dense run of the same seed
    pairs.csv       each run less those that it is compared with: see `pair`
    quality.json    by run: arguments, command lines, versions, device, date; and the corpus

The last two tables follow from those before them. Imports no Megatron. Ours.
"""

from __future__ import annotations

import csv
import json
import os
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy
from quality_runs import REFERENCE, RUNS

from megatron_lighthouse.recipe import recovery
from megatron_lighthouse.recipe.positions import mean_and_error

type Row = dict[str, Any]
type Array = numpy.ndarray[Any, Any]
TABLES = ("curves", "runs", "sequences", "passkey")
LINE = re.compile(r"iteration +(\d+)/ *\d+ \|.*? elapsed time per iteration \(ms\): ([^ ]+) \|.*? lm loss: ([^ ]+) \|")
"""An iteration in Megatron's log."""
STARTED = "===== benchmarks/quality.py starts a process\n"
FIRST = 20
"""Iterations in which runs that differ by rounding alone should not have drifted apart yet."""


@dataclass
class Results:
    """What is known of some runs."""

    tables: dict[str, list[Row]] = field(default_factory=lambda: {name: [] for name in TABLES})
    facts: Row = field(default_factory=dict)
    """quality.json."""

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


def run_row(facts: Row, points: Sequence[Row], evaluation: Row | None) -> Row:
    """A run's row of runs.csv.

    Seconds are of the training loop as Megatron logs them: without start-up, checkpoints and evaluation, but with whatever
    the first iterations of a process compile. Steady seconds are without that too: iterations times their median, by stage.
    Tokens per second are those of the median iteration of each stage. Recovery is as megatron_lighthouse.recipe.recovery
    measures it, here from Megatron's log: a process that is killed takes the last minutes of its TensorBoard log with it.

    Args:
        facts: the run's run.json.
        points: its part of curves.csv.
        evaluation: evaluation.json of its last checkpoint, where there is one.
    """
    switch, dense_from = facts["switch"], facts["dense_from"]
    stages: dict[str, list[float]] = {"lighthouse": [], "return": [], "dense": []}
    for point in points:
        i = point["iteration"]
        stages["lighthouse" if i <= switch else "return" if i < dense_from else "dense"].append(point["seconds"])
    medians = {name: statistics.median(times) if times else None for name, times in stages.items()}
    last = [point["loss"] for point in points[-facts["smooth"] :]]
    answer: Row = {name: facts[name] for name in ("run", "title", "seed", "ranks", "steps", "switch", "dense_from", "smooth")}
    answer |= {"iterations": len(points), "tokens": len(points) * facts["tokens"]}
    answer["seconds"] = round(sum(sum(times) for times in stages.values()), 2)
    answer["steady_seconds"] = round(sum(len(times) * (medians[name] or 0) for name, times in stages.items()), 2)
    for name in ("lighthouse", "dense"):
        answer[f"tokens_per_second_{name}"] = round(facts["tokens"] / medians[name], 1) if medians[name] else None
    answer["training_loss"] = statistics.fmean(last) if last else None
    loss, probe = ((evaluation or {}).get(name) or {} for name in ("loss", "passkey"))
    answer |= {"sequences": loss.get("sequences"), "held_out_loss": loss.get("mean")}
    answer["held_out_error"] = loss.get("standard_error")
    for filler in ("noise", "classic"):
        found = probe.get("fillers", {}).get(filler, {})
        for name in ("accuracy", "log_probability"):
            answer |= {f"{filler}_{name}": found.get(name), f"{filler}_{name}_error": found.get(f"{name}_standard_error")}
    found = {}
    if stages["lighthouse"] and stages["dense"]:
        losses = {point["iteration"]: point["loss"] for point in points}
        measured = recovery.measure(losses, switch, dense_from, facts["smooth"])
        found = recovery.report(recovery.Run(losses, switch, dense_from, facts["tokens"]), measured, None)
    for name in ("level", "scatter", "spike", "spike_iteration", "iterations_to_recover", "tokens_to_recover"):
        answer[name] = found.get(name)
    return answer


def from_work(work: Path) -> Results:
    """All that the runs in a --work folder have left by now."""
    results = Results(facts={"corpus": read_json(work / "corpus.json") or {}, "runs": {}})
    for name in RUNS:
        folder = work / name
        facts = read_json(folder / "run.json")
        if facts is None:
            continue
        log, evaluation = folder / "train.log", read_json(folder / "evaluation" / "evaluation.json")
        points = curve(log.read_text(errors="replace")) if log.exists() else []
        found: dict[str, list[Row]] = {"curves": points, "runs": [run_row(facts, points, evaluation)]}
        if evaluation:  # it is written last
            facts["held_out"], facts["versions"] = evaluation["held_out"], facts["versions"] | evaluation["versions"]
            found["sequences"] = read_csv(folder / "evaluation" / "loss_by_sequence.csv")
            found["passkey"] = read_csv(folder / "evaluation" / "passkey.csv")
        results.facts["runs"][name] = facts
        for table, rows in found.items():
            results.tables[table] += [{"run": name, **values} for values in rows]
    return results


def read(folder: Path) -> Results:
    """What `write` wrote.

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
        ValueError: results that cannot be compared: of another model, length or corpus.
    """
    answer = Results(facts={"corpus": {}, "runs": {}})
    for results in all_results:
        known = {**answer.facts["runs"], **results.facts["runs"]}
        for name in ("model", "tokens", "steps", "seq_length", "held_out"):
            values = {json.dumps(facts[name], sort_keys=True) for facts in known.values() if facts.get(name) is not None}
            if len(values) > 1:
                raise ValueError(f"runs of different {name} ({', '.join(sorted(values))}) do not compare: merge others.")
        for table in TABLES:
            later = {row["run"] for row in results.tables[table]}
            kept = [row for row in answer.tables[table] if row["run"] not in later]
            answer.tables[table] = sorted(kept + results.tables[table], key=lambda row: list(RUNS).index(row["run"]))
        answer.facts["runs"] = {name: known[name] for name in RUNS if name in known}
        answer.facts["corpus"] = results.facts["corpus"] or answer.facts["corpus"]
    return answer


def buckets_of(results: Results, run: str) -> tuple[list[int], list[int], Array]:
    """Where the run's held-out sequences start, the edges of the buckets, and [sequences, buckets] losses."""
    rows = results.of("sequences", run)
    starts = [int(name) for name in rows[0] if name not in ("run", "starts_at")] if rows else []
    length = results.facts["runs"][run]["seq_length"]
    losses = numpy.array([[row[str(start)] for start in starts] for row in rows], dtype=float)
    return [row["starts_at"] for row in rows], [*starts, length], losses


def paired(results: Results, run: str, against: str) -> Array | None:
    """[sequences, buckets] held-out losses of `run` less those of `against`, over the same text; None where one is not there.

    Raises:
        ValueError: evaluations of different sequences.
    """
    if not (results.of("sequences", run) and results.of("sequences", against)):
        return None
    (starts, edges, ours), (others, other_edges, theirs) = (buckets_of(results, name) for name in (run, against))
    if (starts, edges) != (others, other_edges):
        raise ValueError(f"{run} and {against} were evaluated on different sequences: use the same --loss-sequences.")
    return ours - theirs


def pair(results: Results, run: str, against: str) -> Row | None:
    """A row of pairs.csv; None where the two have no iteration in common.

    `difference` is the mean over held-out sequences of the run's loss less the other's, and its standard error over them: of
    the text, not of training, for which there is a second seed. `gap` is that of the last training losses (recipe.recovery).
    """
    ours, theirs = results.losses(run), results.losses(against)
    common = [abs(ours[i] - theirs[i]) for i in sorted(ours.keys() & theirs.keys())]
    if not common:
        return None
    facts = results.facts["runs"][run]
    answer: Row = {"run": run, "against": against, "sequences": None, "difference": None, "standard_error": None}
    differences = paired(results, run, against)
    if differences is not None:
        widths = numpy.diff(buckets_of(results, run)[1])
        mean, error = mean_and_error(differences @ widths / widths.sum())
        answer |= {"sequences": len(differences), "difference": float(mean), "standard_error": float(error)}
    answer["gap"], _, answer["gap_iteration"] = recovery.gap(ours, theirs, facts["smooth"])
    answer |= {"greatest_distance_at_first": max(common[:FIRST]), "mean_distance": statistics.fmean(common)}
    return answer


def pairs(results: Results) -> list[Row]:
    """pairs.csv."""
    wanted = [(run, other) for run in results.facts["runs"] for other in RUNS[run].against]
    found = (pair(results, run, other) for run, other in wanted if other in results.facts["runs"])
    return [row for row in found if row]


def positions(results: Results) -> list[Row]:
    """positions.csv. `above` is the run's loss less that of the dense run of its seed, in pairs."""
    rows = []
    for run in results.facts["runs"]:
        if not results.of("sequences", run):
            continue
        _, edges, losses = buckets_of(results, run)
        means, errors = mean_and_error(losses)
        dense = next((name for name in RUNS[run].against if name.startswith(REFERENCE)), "")
        differences = paired(results, run, dense) if dense in results.facts["runs"] else None
        above = (None, None) if differences is None else mean_and_error(differences)
        columns = {"loss": means, "standard_error": errors, "above": above[0], "above_error": above[1]}
        for i, (start, stop) in enumerate(pairwise(edges)):
            values = {name: None if column is None else float(column[i]) for name, column in columns.items()}
            rows.append({"run": run, "start": start, "stop": stop, **values})
    return rows


def write(results: Results, out: Path) -> None:
    """Write all tables. Each file is replaced whole, so that a reader finds the old one or the new one."""
    out.mkdir(parents=True, exist_ok=True)
    tables = {**results.tables, "positions": positions(results), "pairs": pairs(results)}
    for name, rows in tables.items():
        if not rows:
            continue
        with _replacing(out / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        os.replace(_replacing(out / f"{name}.csv"), out / f"{name}.csv")
    write_json(out / "quality.json", results.facts)


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
