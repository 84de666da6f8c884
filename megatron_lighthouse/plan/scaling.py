"""Collects runs into scaling.csv, scaling.txt and plots: throughput, efficiency and memory, measured beside predicted.

A run is a folder with a `run.json` and, once it has begun, Megatron's `*.log` (with --log-interval 1), beside it or in `logs/`.
What launch scripts write into run.json before the run starts:

    {"attention": "lighthouse",     dense or lighthouse
     "seq_length": 98304,           tokens
     "context_parallel": 2,         and tensor_parallel, pipeline_parallel: 1 where missing
     "gpus": 2,
     "recipe": "530m-98k",          a name in recipes.toml: the model, and what the prediction starts from
     "global_batch": 1,             sequences a step; 1 for each data-parallel rank where missing
     "device": "h100",              for the prediction; none where missing
     "vocab": 384,                  rows of the embedding; the recipe's where missing
     "levels": 3, "pooling": 4, "budget": 1536, "tile_budget": 128,     what the length asks for where missing
     "around": "parallax",          what Lighthouse is around; softmax where it is missing
     "edge_budget": 3072,           of the first and last layers, which are dense where it is missing
     "layers": 30, "hidden": 1024, "ffn": 1536, "heads": 8, "groups": 8, "head_dim": 128, "dense_first": 2, "dense_last": 2,
                                    the recipe's where missing; a recipe that is not in recipes.toml needs all but the last two
     "scorer": "norm",              or in "arguments", as "inner", "steps" and "transformer_impl"
     "recompute": "none",           none, mlp or full
     "cp_comm_type": "p2p", "job": "1234_0", "arguments": "--attention lighthouse …"}

The median of the iterations after the third of each log is the step, or the third where it is the last; a run with fewer,
without a log, or whose run.json lacks something has empty cells, and a line under the table says why. Efficiency is
tokens/s/GPU over that of the fewest context-parallel ranks among runs that differ in nothing else (`alike.WORDS`).
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_lighthouse.lighthouse.config import LighthouseConfig
from megatron_lighthouse.plan import alike, memory, time
from megatron_lighthouse.plan.alike import MODEL, Row
from megatron_lighthouse.plan.calibration import coefficients
from megatron_lighthouse.plan.device import device_of
from megatron_lighthouse.plan.model import GPT, UNTIED
from megatron_lighthouse.plan.report import table
from megatron_lighthouse.plan.run import Run, recipes, run_of
from megatron_lighthouse.usage import once

NEEDED = ("attention", "seq_length", "context_parallel", "gpus", "recipe")
WARM_UP, LEAST = 3, 2
"""Iterations that are not counted, and where no more were logged: Megatron's second time is the mean of the first two."""
COLUMNS = (
    *("run", "recipe", "attention", "seq_length", "context_parallel", "gpus", "recompute", "iterations", "seconds_a_step"),
    *("tokens_s_gpu", "efficiency", "peak_gib", "predicted_tokens_s_gpu", "predicted_peak_gib", "last_loss"),
)
BESIDE = (
    *("tensor_parallel", "pipeline_parallel", "levels", "pooling", "budget", "edge_budget", "device"),
    *("tile_budget", "dense_first", "dense_last", "cp_comm_type"),
)
"""In scaling.csv alone: what else tells one run from another; L, p and k are empty where run.json does not say."""
CONFIG = ("levels", "pooling", "budget", "tile_budget")
NAMES = ("attention", "recipe", "recompute", "cp_comm_type", "device", "around", *alike.OF_WORDS)
SIZES = ("seq_length", "context_parallel", "tensor_parallel", "pipeline_parallel", "gpus", "global_batch", "edge_budget")
NUMBERS = (*SIZES, *CONFIG, *MODEL)


def collect(results: Sequence[Path], out: Path) -> str:
    """Write everything to `out`; the table and what it lacks.

    Raises:
        ValueError: there is no run at all.
        OSError: `out` cannot be written. A run that cannot be read has a note instead.
    """
    folders = sorted({file.parent for root in results for file in [*root.glob("run.json"), *root.glob("**/run.json")]})
    if not folders:
        named = " ".join(map(str, results))
        raise ValueError(f"scaling {named}: no run.json in there: name folders that hold one for each run, beside its *.log.")
    out.mkdir(parents=True, exist_ok=True)  # before the work
    rows, of_runs = [], list[tuple[str, str]]()
    names = Counter(folder.name for folder in folders)
    for folder in folders:
        row, found = read(folder)
        if names[folder.name] > 1:  # as of several studies
            row["run"] = str(folder.relative_to(os.path.commonpath(folders)))
        rows.append(row)
        of_runs += [(str(folder), note) for note in found]
    rows.sort(key=lambda r: [str(r.get(k) or "").rjust(12) for k in ("recipe", "seq_length", "attention", "context_parallel")])
    known = [row for row in rows if all(name in row for name in NEEDED)]
    alike.settle(known)
    notes = [*once(of_runs), *alike.differences(known), *once(alike.efficiency(known))]
    with (out / "scaling.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *BESIDE], restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    pictures: list[str] = []
    if find_spec("matplotlib"):
        from megatron_lighthouse.plan import scaling_plots

        pictures = scaling_plots.draw(rows, out)
    else:
        notes.append("matplotlib is not installed: no pictures")
    text = table(COLUMNS, [[_cell(row.get(name)) for name in COLUMNS] for row in rows])
    text = "\n".join([text, *notes])
    (out / "scaling.txt").write_text(text + "\n")
    written = ", ".join(str(out / name) for name in ("scaling.csv", "scaling.txt", *pictures))
    return f"{text}\nwritten: {written}"


def read(folder: Path) -> tuple[Row, list[str]]:
    """One row of the table, and what is missing."""
    try:
        info = json.loads((folder / "run.json").read_text())
        logs = [log.read_text(errors="replace") for log in sorted([*folder.glob("*.log"), *folder.glob("logs/*.log")])]
    except OSError as error:
        return {"run": folder.name}, [f"cannot be read ({error})"]
    except ValueError as error:
        return {"run": folder.name}, [f"run.json is no JSON ({error})"]
    if not isinstance(info, dict):
        return {"run": folder.name}, ["run.json holds no JSON object"]
    notes = [f"run.json: {name} is {info.pop(name)!r}, not {rule}: left out" for name, rule in _wrong(info).items()]
    row: Row = {
        "run": folder.name,
        "folder": str(folder),
        "tensor_parallel": 1,
        "pipeline_parallel": 1,
        "kind": alike.kind(info),
        **{name: info[name] for name in (*NEEDED, "recompute", *BESIDE) if name in info},
    }
    missing = [name for name in NEEDED if name not in info]
    notes += [f"run.json lacks {', '.join(missing)}: in no picture"] if missing else []
    text = "\n".join(logs)
    # each log is of one start, and each start warms up
    found = [_numbers(r"elapsed time per iteration \(ms\): (\S+)", log) for log in logs]
    counted = [ms / 1000 for one in found for ms in one[min(WARM_UP, max(LEAST, len(one) - 1)) :]]
    times = [seconds for seconds in counted if 0 < seconds < math.inf]
    if wrong := len(counted) - len(times):
        notes.append(f"{wrong} of {len(counted)} step times in the log are no time above 0: left out")
    iterations = sum(map(len, found))
    losses = _numbers(r"lm loss: (\S+)", text)
    if losses and not math.isfinite(losses[-1]):
        notes.append(f"the last loss in the log is {losses.pop()}: left out")
        losses.clear()
    peaks = [float(x) for x in re.findall(r"max allocated: (\d+\.\d+)", text) if float(x)]  # MiB; 0 without a GPU
    row |= {"iterations": iterations, "last_loss": losses[-1] if losses else None}
    row["peak_gib"] = round(max(peaks) / 1024, 2) if peaks else None
    if not text:
        notes.append("no log: not started, or still queued")
    elif not times and not wrong:
        notes.append(f"{iterations} iterations, of which the first {LEAST} of a start warm up: no step time")
    if text and not peaks:
        notes.append("no 'max allocated' in the log: no memory")
    if "device" not in info:
        notes.append("run.json names no device: nothing is predicted, and it is compared with none that names one")
    if not missing:
        try:
            _speeds(row, info, times)
        except (ValueError, TypeError, ArithmeticError) as error:
            notes.append(f"run.json describes no run, so nothing is predicted: {error}")
    return row, notes


def _numbers(pattern: str, log: str) -> list[float]:
    """What stands in these places of a log; NaN for what is no number, such as a word that was cut short."""

    def number(word: str) -> float:
        try:
            return float(word)
        except ValueError:
            return math.nan

    return [number(word) for word in re.findall(pattern, log)]


def _wrong(info: Row) -> dict[str, str]:
    """What run.json holds that is no such thing, and what it should be."""
    least = {name: 0 if name.startswith("dense") else 1 for name in NUMBERS}
    found = {name: "a name" for name in NAMES if name in info and not isinstance(info[name], str)}
    for name in NUMBERS:
        if name in info and not (type(info[name]) is int and info[name] >= least[name]):  # True is an int too
            found[name] = f"a whole number of at least {least[name]}"
    return found


def _speeds(row: Row, info: Row, times: list[float]) -> None:
    """Step and throughput as measured, and as predicted where the device is known."""
    ranks = {name: info.get(name, 1) for name in ("tensor_parallel", "context_parallel", "pipeline_parallel")}
    one = math.prod(ranks.values())
    if info["gpus"] % one:
        raise ValueError(f"gpus {info['gpus']} is no multiple of the {one} of tensor_, context_ and pipeline_parallel")
    apart = info["gpus"] // one
    batch = info.get("global_batch", apart)
    if times:
        seconds = statistics.median(times)
        row["seconds_a_step"] = round(seconds, 4) or seconds
        row["tokens_s_gpu"] = round(info["seq_length"] * batch / row["seconds_a_step"] / info["gpus"], 1)
    if "device" not in info:
        return
    names = ("attention", "seq_length", "gpus", "recompute", "cp_comm_type", "edge_budget")
    own: Row = {name: info[name] for name in names if name in info}
    changes: Row = {"recompute": "none", **own, **ranks, "global_batch": batch}
    sizes = {name: info[name] for name in MODEL if name in info}
    if info["recipe"] in recipes() or len(sizes) < len(MODEL) - 2:
        run = run_of(info["recipe"], **changes)
        run = run.change(model=replace(run.model, **sizes))
    else:
        run = Run(GPT(**sizes, tied=UNTIED not in str(info.get("arguments", UNTIED)).split()), **changes)
    config = LighthouseConfig.for_length(run.seq_length, **{name: info[name] for name in (*CONFIG, "around") if name in info})
    config = config.replace(scorer=row["kind"]["scorer"] or config.scorer)
    run = run.change(config=config, device=device_of(info["device"])).check()
    row["predicted_tokens_s_gpu"] = round(time.tokens_per_gpu(run, coefficients()), 1)
    row["predicted_peak_gib"] = round(memory.total(run) / 2**30, 2)


def _cell(value: Any) -> str:
    return "" if value is None else str(value)
