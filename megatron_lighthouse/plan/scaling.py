"""Collects runs into scaling.csv, scaling.txt and plots: throughput, efficiency and memory, measured beside predicted.

A run is a folder with a `run.json` and, once it has begun, Megatron's `*.log` (with --log-interval 1). What launch scripts
write into run.json before the run starts:

    {"attention": "lighthouse",     dense or lighthouse
     "seq_length": 98304,           tokens
     "context_parallel": 2,         and tensor_parallel, pipeline_parallel: 1 where missing
     "gpus": 2,
     "recipe": "530m-98k",          a name in recipes.toml: the model, and what the prediction starts from
     "global_batch": 1,             sequences a step; 1 for each data-parallel rank where missing
     "device": "h100",              for the prediction; none where missing
     "vocab": 384,                  rows of the embedding; the recipe's where missing
     "levels": 3, "pooling": 4, "budget": 1536,     the recipe's where missing
     "recompute": "none", "cp_comm_type": "p2p", "job": "1234_0"}

The median of the iterations after the third is the step; a run with no more than that, without a log, or whose run.json lacks
something has empty cells, and a line under the table says why. Efficiency is tokens/s/GPU over that of the run of fewest
context-parallel ranks of the same attention, length and recipe.
"""

from __future__ import annotations

import csv
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_lighthouse.plan import memory, scaling_plots, time
from megatron_lighthouse.plan.calibration import coefficients
from megatron_lighthouse.plan.device import device_of
from megatron_lighthouse.plan.report import table
from megatron_lighthouse.plan.run import run_of

NEEDED = ("attention", "seq_length", "context_parallel", "gpus", "recipe")
WARM_UP = 3
"""Iterations that are not counted."""
COLUMNS = (
    *("run", "recipe", "attention", "seq_length", "context_parallel", "gpus", "iterations", "seconds_a_step"),
    *("tokens_s_gpu", "efficiency", "peak_gib", "predicted_tokens_s_gpu", "predicted_peak_gib", "last_loss"),
)
type Row = dict[str, Any]


def collect(results: Sequence[Path], out: Path) -> str:
    """Write everything to `out`; the table and what it lacks. Raises ValueError where there is no run at all."""
    folders = sorted({file.parent for root in results for file in [*root.glob("run.json"), *root.glob("**/run.json")]})
    if not folders:
        named = " ".join(map(str, results))
        raise ValueError(f"scaling {named}: no run.json in there: name folders that hold one for each run, beside its *.log.")
    rows, notes = [], []
    for folder in folders:
        row, found = read(folder)
        rows.append(row)
        notes += [f"{folder}: {note}" for note in found]
    rows.sort(key=lambda r: [str(r.get(k) or "").rjust(12) for k in ("recipe", "seq_length", "attention", "context_parallel")])
    _efficiency(rows)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "scaling.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    pictures = scaling_plots.draw(rows, out)
    text = table(COLUMNS, [[_cell(row.get(name)) for name in COLUMNS] for row in rows])
    text = "\n".join([text, *notes])
    (out / "scaling.txt").write_text(text + "\n")
    written = ", ".join(str(out / name) for name in ("scaling.csv", "scaling.txt", *pictures))
    return f"{text}\nwritten: {written}"


def read(folder: Path) -> tuple[Row, list[str]]:
    """One row of the table, and what is missing."""
    try:
        info = json.loads((folder / "run.json").read_text())
    except ValueError as error:
        return {"run": folder.name}, [f"run.json is no JSON ({error})"]
    if not isinstance(info, dict):
        return {"run": folder.name}, ["run.json holds no JSON object"]
    row: Row = {"run": folder.name, **{name: info[name] for name in NEEDED if name in info}}
    missing = [name for name in NEEDED if name not in info]
    notes = [f"run.json lacks {', '.join(missing)}"] if missing else []
    text = "\n".join(log.read_text(errors="replace") for log in sorted(folder.glob("*.log")))
    times = [float(x) / 1000 for x in re.findall(r"elapsed time per iteration \(ms\): ([\d.]+)", text)]
    losses = re.findall(r"lm loss: ([\d.E+-]+)", text)
    peaks = [float(x) for x in re.findall(r"max allocated: ([\d.]+)", text)]  # MiB
    row |= {"iterations": len(times), "last_loss": float(losses[-1]) if losses else None}
    row["peak_gib"] = round(max(peaks) / 1024, 2) if peaks else None
    if not text:
        notes.append("no log: not started, or still queued")
    elif len(times) <= WARM_UP:
        notes.append(f"{len(times)} iterations, of which {WARM_UP} warm up: no step time")
    if text and not peaks:
        notes.append("no 'max allocated' in the log: no memory")
    if not missing:
        try:
            _speeds(row, info, times)
        except (ValueError, TypeError, ZeroDivisionError) as error:
            notes.append(f"run.json describes no run, so nothing is predicted: {error}")
    return row, notes


def _speeds(row: Row, info: Row, times: list[float]) -> None:
    """Step and throughput as measured, and as predicted where the device is known."""
    ranks = {name: int(info.get(name, 1)) for name in ("tensor_parallel", "context_parallel", "pipeline_parallel")}
    apart = int(info["gpus"]) // (ranks["tensor_parallel"] * ranks["context_parallel"] * ranks["pipeline_parallel"])
    batch = int(info.get("global_batch", apart))
    if len(times) > WARM_UP:
        row["seconds_a_step"] = round(statistics.median(times[WARM_UP:]), 4)
        row["tokens_s_gpu"] = round(info["seq_length"] * batch / row["seconds_a_step"] / info["gpus"], 1)
    own: Row = {name: info[name] for name in ("attention", "seq_length", "gpus", "recompute", "cp_comm_type") if name in info}
    changes: Row = {"recompute": "none", **own, **ranks, "global_batch": batch}
    run = run_of(info["recipe"], **changes)
    config = run.config.replace(**{name: info[name] for name in ("levels", "pooling", "budget") if name in info})
    model = replace(
        run.model, **{name: info[name] for name in ("vocab", "layers", "dense_first", "dense_last") if name in info}
    )
    if "device" in info:
        run = run.change(config=config, model=model, device=device_of(info["device"])).check()
        row["predicted_tokens_s_gpu"] = round(time.tokens_per_gpu(run, coefficients()), 1)
        row["predicted_peak_gib"] = round(memory.total(run) / 2**30, 2)


def _efficiency(rows: list[Row]) -> None:
    """Tokens/s/GPU over that of the fewest context-parallel ranks of the same attention, length and recipe."""
    for row in rows:
        alike = [
            r for r in rows if r.get("tokens_s_gpu") and all(r[k] == row.get(k) for k in ("recipe", "attention", "seq_length"))
        ]
        if row.get("tokens_s_gpu"):
            base = min(alike, key=lambda r: r["context_parallel"])
            row["efficiency"] = round(row["tokens_s_gpu"] / base["tokens_s_gpu"], 4)


def _cell(value: Any) -> str:
    return "" if value is None else str(value)
