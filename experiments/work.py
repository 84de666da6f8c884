"""What the runs in a --work folder have left, as tables. Imports no Megatron. Ours."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.tables import PROBED, Results, Row, column_of, first, read_csv, read_json
from megatron_lighthouse.recipe import recovery, recovery_log
from megatron_lighthouse.recipe.printed_log import curve, median, stages, steady
from megatron_lighthouse.recipe.probe import FILLERS, Probe
from megatron_lighthouse.recipe.probes import PROBES

STARTED = "===== benchmarks/quality.py starts a process\n"
"""Stands in a log before what each process printed. The logs that are kept have it with the script's first name."""


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
    switch, dense_from, warmup = facts["switch"], facts["dense_from"], facts.get("warmup", 0)
    times = stages(points, switch, dense_from, warmup)
    last = [point["loss"] for point in points[-facts["smooth"] :]]
    answer: Row = {name: facts[name] for name in ("run", "title", "seed", "ranks", "at_once", "steps", "switch", "dense_from")}
    answer |= {"warmup": warmup} if warmup else {}
    answer |= {"smooth": facts["smooth"], "device": facts.get("device"), "gpu": facts.get("gpu")}
    answer |= {"iterations": len(points), "tokens": len(points) * facts["tokens"]}
    answer["seconds"] = round(sum(point["seconds"] for point in points), 2)
    answer["steady_seconds"] = round(sum(steady(points, switch, dense_from, warmup)), 2)
    for name in ("lighthouse", "dense"):
        seconds = median(times[name])
        answer[f"tokens_per_second_{name}"] = round(facts["tokens"] / seconds, 1) if seconds else None
    answer["training_loss"] = statistics.fmean(last) if last else None
    loss = (evaluation or {}).get("loss") or {}
    answer |= {"sequences": loss.get("sequences"), "held_out_loss": loss.get("mean")}
    answer["held_out_error"] = loss.get("standard_error")
    for probe in PROBES:
        answer |= probed(probe, (evaluation or {}).get(probe.name))
    found = {}
    if times["lighthouse"] and times["dense"]:
        losses = {point["iteration"]: point["loss"] for point in points}
        try:
            measured = recovery.measure(losses, switch, dense_from, facts["smooth"], warmup)
        except ValueError as error:
            print(f"{facts['run']}: recovery is left out: {error}", file=sys.stderr)
            measured = None
        found = (
            {}
            if measured is None
            else recovery.report(recovery_log.Run(losses, switch, dense_from, facts["tokens"]), measured, None, facts["smooth"])
        )
    for name in ("level", "scatter", "spike", "spike_iteration", "iterations_to_recover", "tokens_to_recover"):
        answer[name] = found.get(name)
    return answer


def probed(probe: Probe, found: Row | None) -> Row:
    """What runs.csv has of a probe: nothing where it was not asked, but for the passkey, whose columns are always there.

    Args:
        found: its part of evaluation.json.
    """
    if not found and not first(probe):
        return {}
    answer: Row = {}
    for filler in FILLERS:
        of_filler = (found or {}).get("fillers", {}).get(filler, {})
        for name in ("accuracy", "log_probability"):
            answer[column_of(probe, f"{filler}_{name}")] = of_filler.get(name)
            answer[column_of(probe, f"{filler}_{name}_error")] = of_filler.get(f"{name}_standard_error")
    return answer


def facts_of(path: Path) -> Row:
    """A run's run.json.

    Raises:
        ValueError: half of one, which would leave the run out.
    """
    facts = read_json(path)
    if not isinstance(facts, dict) or "experiment" not in facts:
        raise ValueError(
            f"{path} is cut short, or no run's: remove it, and give the command that trained the run once more, which writes "
            "it again and trains on from the last checkpoint; or remove the run's folder."
        )
    return facts


def from_work(work: Path) -> Results:
    """All that the runs in a --work folder have left by now, or in what `pack` kept of it.

    Raises:
        ValueError: a folder without runs, with those of two experiments, or with a run.json that is not whole.
    """
    known = {path.parent.name: facts_of(path) for path in sorted(work.glob("*/run.json"))}
    if not known:
        raise ValueError(f"{work} has no RUN/run.json: give a --work folder, or work.tgz unpacked.")
    experiment, *others = sorted({facts["experiment"] for facts in known.values()})
    if others:
        raise ValueError(f"{work} has runs of {experiment} and of {', '.join(others)}: give a folder for each experiment.")
    results = Results(facts={"experiment": experiment, "corpus": read_json(work / "corpus.json") or {}, "runs": {}})
    if unknown := sorted(known.keys() - results.runs.keys()):
        print(f"{', '.join(unknown)}: no run of {experiment}, left out", file=sys.stderr)
    for name in (name for name in results.runs if name in known):
        folder, facts = work / name, known[name]
        log, evaluation = folder / "train.log", read_json(folder / "evaluation" / "evaluation.json")
        if evaluation is None and (folder / "evaluation" / "evaluation.json").exists():
            print(f"{folder / 'evaluation' / 'evaluation.json'} is cut short: the evaluation is left out", file=sys.stderr)
        points = curve(log.read_text(errors="replace"), STARTED) if log.exists() else []
        found: dict[str, list[Row]] = {"curves": points, "runs": [run_row(facts, points, evaluation)]}
        if evaluation:  # it is written last
            facts["held_out"], facts["versions"] = evaluation["held_out"], facts["versions"] | evaluation["versions"]
            found["sequences"] = read_csv(folder / "evaluation" / "loss_by_sequence.csv")
            for table in (name for both in PROBED.values() for name in both):
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
