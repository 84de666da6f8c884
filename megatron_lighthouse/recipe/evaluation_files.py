"""What an evaluation leaves in `--out`: a measurement's tables and picture once it is taken, `evaluation.json` last.

Each file appears whole. By rank 0 alone.
"""

from __future__ import annotations

import csv
import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_lighthouse.recipe.probe import CHANCE, Probe
from megatron_lighthouse.recipe.probes import PROBES

type Result = dict[str, Any]
SUMMARY = "evaluation.json"
NAMES = (
    *(SUMMARY, "loss.csv", "loss_by_sequence.csv", "loss.png"),
    *(f"{one.name}{rest}" for one in PROBES for rest in (".csv", "_by_question.csv", ".png")),
    *("hindsight.csv", "hindsight.png"),
)
"""All there can be; the summary, which says that the others are there, is removed first."""
NO_FOLDER = "--out {} must be a folder that can be written to, or not exist yet, such as results: {}."
PARTIAL = ".partial"
"""After the name of a file that is being written."""


def check(out: Path) -> None:
    """Refuse a path that cannot be such a folder; nothing is made or removed.

    Raises:
        ValueError: why.
    """
    try:
        at = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    except OSError as error:
        raise ValueError(NO_FOLDER.format(out, error)) from None
    if not at.is_dir() or not os.access(at, os.W_OK | os.X_OK):
        raise ValueError(NO_FOLDER.format(out, f"{at} is {'not yours to write' if at.is_dir() else 'no folder'}"))


def start(out: Path) -> None:
    """Make the folder, and remove what an earlier evaluation wrote there, for it may be of another checkpoint.

    Raises:
        ValueError: a path that cannot be such a folder.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in NAMES:
            (out / name).unlink(missing_ok=True)
            (out / (name + PARTIAL)).unlink(missing_ok=True)
        with tempfile.TemporaryFile(dir=out):  # whether files can be written, before hours of work
            pass
    except OSError as error:
        raise ValueError(NO_FOLDER.format(out, error)) from None


def loss(out: Path, found: Result, title: str) -> Result:
    """Write it and say it; answers what belongs in the summary."""
    from megatron_lighthouse.recipe import evaluation_plots

    _write_csv(out / "loss.csv", found["buckets"])
    _write_csv(out / "loss_by_sequence.csv", found["by_sequence"])
    with _whole(out / "loss.png") as partial:
        evaluation_plots.loss_by_position(found["buckets"], partial, title, found["unit"], found["position_in"])
    mean = f"{found['mean']:.4f} ± {found['standard_error']:.4f} nats per {found['unit']}"
    print(f"held-out loss {mean}, {found['sequences']} sequences")
    return _without(found, "by_sequence")


def probe(asked: Probe, out: Path, found: Result, title: str) -> Result:
    """As `loss`."""
    from megatron_lighthouse.recipe import evaluation_plots

    _write_csv(out / f"{asked.name}.csv", found["cells"])
    _write_csv(out / f"{asked.name}_by_question.csv", found["questions"])
    with _whole(out / f"{asked.name}.png") as partial:
        evaluation_plots.probe(asked, found["cells"], partial, title)
    for filler, result in found["fillers"].items():
        right = f"{result['accuracy']:.1%} ± {result['accuracy_standard_error']:.1%} right of {result['samples']}"
        print(f"{asked.title} in {filler}: {right}, chance {CHANCE:.0%}")
    return _without(found, "cells", "questions")


def hindsight(out: Path, found: Result, title: str) -> Result:
    """As `loss`."""
    from megatron_lighthouse.recipe import evaluation_plots

    _write_csv(out / "hindsight.csv", found["distances"])
    with _whole(out / "hindsight.png") as partial:
        evaluation_plots.hindsight(found["distances"], partial, title, found["unit"])
    mean = f"{found['difference']:.4f} ± {found['standard_error']:.4f} nats per {found['unit']}"
    print(f"hindsight {mean}, {found['samples']} samples")
    return _without(found, "distances")


def summary(out: Path, facts: Result) -> None:
    """Write `evaluation.json`: after all else, so that where it is, all is."""
    with _whole(out / SUMMARY) as partial:
        partial.write_text(json.dumps(_without_nan(facts), indent=1) + "\n")
    print(f"results: {out}")


def _without(found: Result, *names: str) -> Result:
    return {name: value for name, value in found.items() if name not in names}


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: null in its place."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _write_csv(path: Path, rows: Sequence[dict[Any, Any]]) -> None:
    with _whole(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Where to write so that `path` appears whole, or not at all."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
