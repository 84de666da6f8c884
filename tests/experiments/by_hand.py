"""Results of a few iterations, sequences and questions, small enough to be added up by hand."""

from __future__ import annotations

from typing import Any

from experiments.runs import BASE, EXPERIMENTS
from experiments.tables import Results


def facts(run: str, experiment: str = "short", **more: Any) -> dict[str, Any]:
    known = {
        "experiment": experiment,
        "title": EXPERIMENTS[experiment].runs[run].title,
        "seed": 1,
        "ranks": 1,
        "at_once": 1,
        "seq_length": 4,
        "tokens": 8,
        "steps": 5,
        "smooth": 2,
    }
    return {"run": run, **known, "switch": 0, "dense_from": 1, **more}


def made(run: str, losses: list[list[float]], curve: list[float], **more: Any) -> Results:
    """Of sequences of four tokens in the buckets 0, 1 and 2-3."""
    known = facts(run, **more)
    found = Results(facts={"experiment": known["experiment"], "corpus": {}, "runs": {run: known}})
    found.tables["curves"] = [{"run": run, "iteration": i + 1, "loss": x, "seconds": 1.0} for i, x in enumerate(curve)]
    names = ("run", "starts_at", "document", "0", "1", "2")
    found.tables["sequences"] = [dict(zip(names, (run, 4 * i, i, *x), strict=True)) for i, x in enumerate(losses)]
    return found


DENSE = made("dense", [[1.0, 1.0, 1.0], [5.0, 3.0, 2.0]], [3.0, 2.0, 1.0])
OURS = made(BASE, [[2.0, 1.0, 1.5], [5.0, 4.0, 4.0]], [3.5, 2.0, 2.0])


def asked(run: str, right: list[int], probe: str = "passkey", axis: str = "depth", **more: Any) -> Results:
    """A finished run of that many seconds, and its answers to one question a digit."""
    found = made(run, [], [3.0], **more)
    row = {"run": run, "iterations": 5, "steps": 5, "at_once": 1, "seconds": 9.0, "gpu": "a"}
    found.tables["runs"] = [{**row, **more}]
    found.tables[f"{probe}_by_question"] = [
        {"run": run, "filler": "noise", "length": 4, axis: 0, "sample": i, "right": x, "log_probability": -float(i)}
        for i, x in enumerate(right)
    ]
    return found
