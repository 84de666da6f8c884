"""`python -m megatron_lighthouse.plan.copy_measured`: write measured.csv again from benchmarks/results, in a clone.

The installed package has no benchmarks; this keeps the few points that the model is fitted to and judged by.
"""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

TARGET = Path(__file__).parent / "measured.csv"
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
COLUMNS = "kind source what direction tokens levels pooling budget batch heads groups dim ranks value".split()
KEPT = {"dense cudnn": "dense", "dense p2p": "dense p2p", "authors": "authors", "lighthouse": "lighthouse", "inner": "inner"}
STEPS = ("score", "select", "gather", "scatter")
CP_CASES = {"96K": (3, 4, 1536), "256K": (3, 4, 2048), "512K": (3, 4, 4096), "1M": (4, 4, 4096)}
"""L, p, k of the cases in benchmarks/context_parallel_times.py."""


def collected(results: Path = RESULTS) -> str:
    """The text of measured.csv."""
    rows = [
        *_attention(results, "lengths-variants.csv"),
        *_attention(results, "shapes.csv"),
        *_ranks(results),
        *_steps(results),
        *_scorers(results),
        *_scaling(results, "scaling.csv"),
        *_scaling(results, "all-layers/scaling.csv"),
        *_two_gpus(results),
    ]
    text = io.StringIO()
    text.write("# Written by megatron_lighthouse.plan.copy_measured; h200: steps of H200s; else of H100s; seconds, GiB, ms.\n")
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _attention(results: Path, name: str) -> list[dict[str, object]]:
    """Rows of one attention layer. Those of lengths-variants.csv with B=4 are an earlier measurement of shapes.csv's."""
    rows = []
    for row in _read(results / "attention" / name):
        sizes = {key: int(value) for key, value in re.findall(r"(\w)=(\d+)", row["case"])}
        what = row["what"]
        if what not in (*KEPT, *STEPS) or not row["ms"] or (name != "shapes.csv" and "B" in sizes):
            continue
        shape = {
            "batch": sizes.get("B", 1),
            "heads": sizes.get("H", 8),
            "groups": sizes.get("G", 8),
            "dim": sizes.get("D", 128),
        }
        geometry = {"tokens": sizes["N"], "levels": sizes["L"], "pooling": sizes["p"], "budget": sizes["k"]}
        value = round(float(row["ms"]), 5)
        head = {"kind": "layer", "source": f"attention/{name}", "what": KEPT.get(what, what), "direction": row["direction"]}
        rows.append({**head, **geometry, **shape, "ranks": 1, "value": value})
        if what == "lighthouse" and row["eager_ms"]:  # one call after the other: at these lengths the host's time
            rows.append({**rows[-1], "kind": "host", "value": row["eager_ms"]})
    return rows


def _ranks(results: Path) -> list[dict[str, object]]:
    rows = []
    for row in _read(results / "context_parallel" / "times.csv"):
        levels, pooling, budget = CP_CASES[row["case"]]
        what = row["what"].replace("inner alone", "inner")
        if "TE" in what:
            continue
        head = {"kind": "layer", "source": "context_parallel/times.csv", "what": what, "ranks": row["ranks"]}
        sizes = {"tokens": row["N"], "levels": levels, "pooling": pooling, "budget": budget}
        shape = {"batch": 1, "heads": 8, "groups": 8, "dim": 128}
        rows += [{**head, **sizes, **shape, "direction": d, "value": row[f"{d}_ms"]} for d in ("fwd", "fwd+bwd")]
        if row["host_ms"]:
            rows.append({**rows[-1], "kind": "host", "value": row["host_ms"]})
    return rows


def _steps(results: Path) -> list[dict[str, object]]:
    """Training steps of the 530M model; what was measured before outputs were discarded says so."""
    rows = []
    for row in _read(results / "training_step" / "training_step.csv"):
        what = row["run"] + (", outputs kept" if "before" in row["machine"] else "")
        head = {"kind": "run", "source": "training_step/training_step.csv", "what": what, "ranks": 1}
        sizes = {"tokens": 98304, "levels": 3, "pooling": 4, "budget": 1536}
        rows += [{**head, **sizes, "direction": "seconds", "value": row["seconds a step"]}]
        rows += [{**head, **sizes, "direction": "peak GiB", "value": row["peak GiB"]}]
    return rows


def _scorers(results: Path) -> list[dict[str, object]]:
    """Layers by scorer, of L = 3, p = 4."""
    rows: list[dict[str, object]] = []
    for row in _read(results / "scorers" / "scorers.csv"):
        head = {"kind": "scorer", "source": "scorers/scorers.csv", "what": row["scorer"], "ranks": 1}
        sizes = {"tokens": row["tokens"], "levels": 3, "pooling": 4, "budget": row["budget"]}
        shape = {"batch": 1, "heads": 8, "groups": 8, "dim": 128}
        rows.append({**head, **sizes, **shape, "direction": "fwd", "value": row["forward ms"]})
    return rows


def _scaling(results: Path, name: str) -> list[dict[str, object]]:
    """The points of the scaling study: of the 530M recipe, one sequence a step, by p2p on as many GPUs as context ranks."""
    rows: list[dict[str, object]] = []
    for row in _read(results / "scaling" / name):
        what = row["attention"] + (", all layers" if name.startswith("all-layers") else "")
        what += "" if row["recompute"] == "none" else f", recompute {row['recompute']}"
        head = {"kind": "run", "source": f"scaling/{name}", "what": what, "ranks": row["context_parallel"]}
        sizes = {"tokens": row["seq_length"], **{name: row[name] for name in ("levels", "pooling", "budget")}}
        rows += [{**head, **sizes, "direction": "seconds", "value": row["seconds_a_step"]}]
        rows += [{**head, **sizes, "direction": "peak GiB", "value": row["peak_gib"]}]
    return rows


def _two_gpus(results: Path) -> list[dict[str, object]]:
    """Steps of the 530M recipe's layers on H200s, eager and under graphs, by context and by tensor parallelism (TP)."""
    rows: list[dict[str, object]] = []
    for row in _read(results / "two_gpus" / "steps.csv"):
        if row["seconds a step"] and "documents" not in row["how"]:
            what = f"{row['attention']}, {row['how']}"
            head = {"kind": "h200", "source": "two_gpus/steps.csv", "what": what, "direction": "seconds", "ranks": row["GPUs"]}
            sizes = {"tokens": row["tokens"], "levels": 3, "pooling": 4, "budget": int(row["tokens"]) // 64}
            rows.append({**head, **sizes, "value": row["seconds a step"]})
    return rows


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    TARGET.write_text(collected())
