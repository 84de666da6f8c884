"""The tables of an experiment: in memory, merged, and as CSV.

    curves.csv      run, iteration, loss (nats per byte), seconds of that iteration
    runs.csv        a row a run: see `work.run_row`
    sequences.csv   held-out loss of each sequence by position bucket: what pairs are made of
    passkey.csv, variables.csv   a row a run and cell
    passkey_by_question.csv, variables_by_question.csv   each question, whether it was answered right, and the right digit's
                    log-probability (nats)
    hindsight.csv   what the selections of the checkpoint at the switch know of later tokens: a row a run and distance
    telemetry.csv   what selection did in the runs that log it: run, iteration, name of the scalar, value
    positions.csv   held-out loss by position bucket, and less that of the dense run of the same seed
    pairs.csv       each run less those that it is compared with: see `pairs`
    quality.json    by run: arguments, command lines, versions, device, date; and the corpus
    work.tgz        what all of these are made from: see `archive`

positions.csv and pairs.csv follow from the tables before them. Imports no Megatron. Ours.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.run import Run
from experiments.runs import EXPERIMENTS
from megatron_lighthouse.recipe.probe import Probe
from megatron_lighthouse.recipe.probes import PROBES

type Row = dict[str, Any]
PROBED = {probe.name: (probe.name, f"{probe.name}_by_question") for probe in PROBES}
"""The tables of each retrieval probe: of cells, and of questions."""
TABLES = ("curves", "runs", "sequences", *(name for both in PROBED.values() for name in both), "hindsight", "telemetry")
FACTS = "quality.json"


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


def first(probe: Probe) -> bool:
    """Whether it is the passkey, once the only one: its columns have no prefix, and are there unasked."""
    return probe is PROBES[0]


def column_of(probe: Probe, name: str) -> str:
    """In runs.csv and pairs.csv."""
    return name if first(probe) else f"{probe.name}_{name}"


def read(folder: Path) -> Results:
    """What `pairs.write` wrote in a folder."""
    return Results({name: read_csv(folder / f"{name}.csv") for name in TABLES}, json.loads((folder / FACTS).read_text()))


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


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Written whole or not at all. A column that some rows lack is empty there."""
    with replacing(path).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    os.replace(replacing(path), path)


def write_json(path: Path, content: Row) -> None:
    """Written whole or not at all."""
    replacing(path).write_text(json.dumps(content, indent=1) + "\n")
    os.replace(replacing(path), path)


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


def replacing(path: Path) -> Path:
    """Where to write what then replaces `path` as a whole."""
    return path.with_name(f".{path.name}.{os.getpid()}")
