"""What follows from the tables: pairs.csv and positions.csv, and all tables written. Imports no Megatron.

Errors of held-out loss are over documents, whose sequences are not independent; where an evaluation does not say the document
of each sequence, they are empty. Those of a probe's answers are over questions. Ours.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy

from experiments.runs import EARLY
from experiments.tables import FACTS, PROBED, Results, Row, column_of, first, write_csv, write_json
from megatron_lighthouse.recipe import recovery
from megatron_lighthouse.recipe.positions import mean_and_error
from megatron_lighthouse.recipe.probe import FILLERS, Probe
from megatron_lighthouse.recipe.probes import PROBES

type Array = numpy.ndarray[Any, Any]
FIRST = 20
"""Iterations in which runs that differ by rounding alone should not have drifted apart yet."""


def buckets_of(results: Results, run: str) -> tuple[list[int], list[int], Array]:
    """Where the run's held-out sequences start, the edges of the buckets, and [sequences, buckets] losses."""
    rows = results.of("sequences", run)
    starts = [int(name) for name in rows[0] if name.isdigit()] if rows else []
    facts = results.facts["runs"][run]
    length = facts.get("evaluated", facts["seq_length"])
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


def documents_of(results: Results, run: str) -> list[int] | None:
    """The document of each held-out sequence; None where the evaluation does not say."""
    rows = results.of("sequences", run)
    return [row["document"] for row in rows] if all(row.get("document") is not None for row in rows) else None


def mean_and_error_of(values: Array, documents: Sequence[int] | None) -> tuple[Array, Array | None]:
    """[sequences, …] -> their mean, and its standard error over documents."""
    if documents is None:
        return values.mean(axis=0), None
    return mean_and_error(values, documents)


def held_out(results: Results, run: str, against: str) -> Row:
    """The held-out loss less the other's: the mean over sequences, its error over documents."""
    answer: Row = dict.fromkeys(("sequences", "documents", "difference", "standard_error"))
    differences, documents = paired(results, run, against), documents_of(results, run)
    if differences is not None:
        widths = numpy.diff(buckets_of(results, run)[1])
        mean, error = mean_and_error_of(differences @ widths / widths.sum(), documents)
        answer |= {"sequences": len(differences), "difference": float(mean)}
        if documents and error is not None:
            answer |= {"documents": len(set(documents)), "standard_error": float(error)}
    return answer


def probed(results: Results, run: str, against: str, probe: Probe) -> Row:
    """Accuracy and log-probability less the other's, question by question, by filler.

    Of a probe that was not asked nothing, but empty columns of the passkey.

    Raises:
        ValueError: evaluations of different questions.
    """
    measured = {"right": "accuracy", "log_probability": "log_probability"}
    names = [f"{filler}_{name}_{what}" for filler in FILLERS for name in measured.values() for what in ("difference", "error")]
    answer: Row = dict.fromkeys(column_of(probe, name) for name in ["questions", *names])
    _, by_question = PROBED[probe.name]
    ours, theirs = (
        {(row["filler"], row["length"], row[probe.axis.name], row["sample"]): row for row in results.of(by_question, name)}
        for name in (run, against)
    )
    if not (ours and theirs):
        return answer if first(probe) else {}
    if ours.keys() != theirs.keys():
        raise ValueError(f"{run} and {against} were asked different questions: use the same --{probe.name}-samples.")
    answer[column_of(probe, "questions")] = len(ours)
    for filler in FILLERS:
        for column, name in measured.items():
            values = [row[column] - theirs[key][column] for key, row in ours.items() if row["filler"] == filler]
            if values:
                mean, error = mean_and_error(numpy.array(values))
                answer[column_of(probe, f"{filler}_{name}_difference")] = float(mean)
                answer[column_of(probe, f"{filler}_{name}_error")] = float(error)
    return answer


def training(results: Results, run: str, against: str) -> Row:
    """How far the training losses lie apart. Empty where the seeds differ: the runs then read other text in an iteration.

    `gap` is that of the last ones. Of a run that switched and one that was dense from the start, `iterations_to_catch_up` is
    counted from the switch, and `dense_spike` is that one's own (recipe.recovery). `distance_before_switch` is the mean up to
    the earlier of two switches: of runs that are the same until then, it is what the order of floating-point sums does.
    """
    answer: Row = dict.fromkeys(
        (
            *("gap", "gap_iteration", "iterations_to_catch_up", "dense_spike"),
            *("greatest_distance_at_first", "early_distance", "mean_distance", "distance_before_switch"),
        )
    )
    facts, other = (results.facts["runs"][name] for name in (run, against))
    if facts["seed"] != other["seed"]:
        return answer
    ours, theirs = results.losses(run), results.losses(against)
    distance = {i: abs(ours[i] - theirs[i]) for i in sorted(ours.keys() & theirs.keys())}
    answer["gap"], _, answer["gap_iteration"] = recovery.gap(ours, theirs, facts["smooth"])
    switch, dense_from = facts["switch"], facts["dense_from"]
    if switch and not other["switch"] and max(ours, default=0) >= dense_from:
        where = (switch, dense_from, facts["smooth"], facts.get("warmup", 0))
        try:
            measured = recovery.measure(ours, *where)
        except ValueError:  # said with the run's own row
            level = None
        else:
            level = recovery.caught_up(ours, theirs, measured.spike_iteration, facts["smooth"])
            answer["dense_spike"] = recovery.own_spike(ours, theirs, *where)
        answer["iterations_to_catch_up"] = None if level is None else level - switch
    answer["greatest_distance_at_first"] = max([*distance.values()][:FIRST])
    answer["early_distance"] = statistics.fmean([*distance.values()][:EARLY])
    answer["mean_distance"] = statistics.fmean(distance.values())
    before = [x for i, x in distance.items() if i <= min(facts["switch"], other["switch"])]
    answer["distance_before_switch"] = statistics.fmean(before) if before else None
    return answer


def cost(results: Results, run: str, against: str) -> Row:
    """The run's seconds over the other's, once both are finished, and whether both were trained on the same GPU.

    Nothing of runs that shared a GPU with others.
    """
    answer: Row = dict.fromkeys(("steady_ratio", "seconds_ratio", "same_gpu"))
    rows = [row for name in (run, against) for row in results.of("runs", name)]
    if len(rows) < 2 or any(row["iterations"] < row["steps"] or row["at_once"] > 1 for row in rows):
        return answer
    ours, theirs = rows
    for name, column in (("steady_ratio", "steady_seconds"), ("seconds_ratio", "seconds")):
        answer[name] = round(ours[column] / theirs[column], 4)
    if ours.get("gpu") and theirs.get("gpu"):
        answer["same_gpu"] = "yes" if ours["gpu"] == theirs["gpu"] else "no"
    return answer


def pair(results: Results, run: str, against: str) -> Row | None:
    """A row of pairs.csv; None where the two have no iteration in common.

    Its errors are those of the text and of the questions, not of training, for which there is a second seed.
    """
    if not results.losses(run).keys() & results.losses(against).keys():
        return None
    answer: Row = {"run": run, "against": against}
    for part in (held_out, training, cost):
        answer |= part(results, run, against)
    for probe in PROBES:
        answer |= probed(results, run, against, probe)
    return answer


def pairs(results: Results) -> list[Row]:
    """pairs.csv."""
    wanted = [(run, other) for run in results.facts["runs"] for other in results.runs[run].against]
    found = (pair(results, run, other) for run, other in wanted if other in results.facts["runs"])
    return [row for row in found if row]


def dense_of(results: Results, run: str) -> str:
    """The dense run that a run is held to; '' of one that is held to none."""
    runs = results.runs
    return next((name for name in runs[run].against if not runs[name].share and runs[name].attention == "dense"), "")


def positions(results: Results) -> list[Row]:
    """positions.csv. `above` is the run's loss less that of the dense run of its seed, in pairs."""
    rows = []
    for run in results.facts["runs"]:
        if not results.of("sequences", run):
            continue
        _, edges, losses = buckets_of(results, run)
        documents = documents_of(results, run)
        means, errors = mean_and_error_of(losses, documents)
        dense = dense_of(results, run)
        differences = paired(results, run, dense) if dense in results.facts["runs"] else None
        above = (None, None) if differences is None else mean_and_error_of(differences, documents)
        columns = {"loss": means, "standard_error": errors, "above": above[0], "above_error": above[1]}
        for i, (start, stop) in enumerate(pairwise(edges)):
            values = {name: None if column is None else float(column[i]) for name, column in columns.items()}
            rows.append({"run": run, "start": start, "stop": stop, **values})
    return rows


def write(results: Results, out: Path) -> None:
    """Write all tables that have a row. A reader finds the old file or the new one."""
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in {**results.tables, "positions": positions(results), "pairs": pairs(results)}.items():
        if rows:
            write_csv(out / f"{name}.csv", rows)
    write_json(out / FACTS, results.facts)
