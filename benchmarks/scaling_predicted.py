"""`python benchmarks/scaling_predicted.py`: what the plan expects of the scaling study, beside what was measured so far.

Leaves attention.csv (a layer, by scheme), training.csv (the points of scaling_points.py, also those that are left out) and
predicted.png. The plan was fitted to one and two H100s: what is said of more is extrapolated, and marked so. Efficiency is over
one GPU at the same length; where that GPU's memory would not hold the model, over what the plan says that it would do.

Each call writes them again. The figures stay the same until the plan counts otherwise, or more is measured: that are the
`scaling.csv` and `times.csv` under `--measured`. Leave there what scaling.sh left in its --out, and run again.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from context_parallel_times import DIM, HEADS, TIMED
from csv_tables import write_csv
from scaling_points import LENGTHS, SIZES, Point, all_candidates

from megatron_lighthouse.context_parallel.schemes import COMM_TYPES
from megatron_lighthouse.lighthouse.geometry import Shape
from megatron_lighthouse.plan import memory, time
from megatron_lighthouse.plan.calibration import coefficients
from megatron_lighthouse.plan.device import DEVICES
from megatron_lighthouse.plan.layer_time import Setup, dense_layer, lighthouse_layer

RESULTS = Path(__file__).parent / "results"
KIND = "h100"
DEVICE = DEVICES[KIND]
MEASURED_RANKS = 2
"""Beyond these the plan extrapolates."""
type Row = dict[str, Any]
type Curves = dict[str, list[tuple[int, float, float | None]]]
"""By name: GPUs, what is predicted, and what was measured."""


def attention_rows(measured: dict[tuple[str, str, int], Row]) -> Iterator[Row]:
    """One layer, B=1, H=G=8, D=128: GPU time, for the host is ahead of it in the benchmark."""
    layer, speed = Shape(1, HEADS, HEADS, DIM, 2), coefficients()
    for case, (length, config) in TIMED.items():
        for ranks in SIZES:
            for scheme in COMM_TYPES[: None if ranks > 1 else 1]:
                try:
                    geometry = config.geometry(length, ranks)
                except ValueError:
                    continue
                setup = Setup(layer, DEVICE, speed, ranks, scheme, ranks)
                ours, dense = lighthouse_layer(geometry, setup), dense_layer(length, setup)
                one = lighthouse_layer(config.geometry(length), Setup(layer, DEVICE, speed))
                what = "lighthouse" if ranks == 1 else f"lighthouse {scheme}"
                found = measured.get((case, what, ranks), {})
                yield {
                    **{"case": case, "N": length, "levels": config.levels, "budget": config.budget, "ranks": ranks},
                    **{"scheme": scheme if ranks > 1 else "", "fwd_ms": ours["fwd"] * 1e3, "fwd+bwd_ms": ours["fwd+bwd"] * 1e3},
                    "efficiency": one["fwd+bwd"] / ours["fwd+bwd"] / ranks,
                    "times_dense": dense["fwd+bwd"] / ours["fwd+bwd"],
                    "extrapolated": "yes" if ranks > MEASURED_RANKS else "",
                    **{"measured_fwd+bwd_ms": found.get("fwd+bwd_ms", ""), "measured_efficiency": found.get("efficiency", "")},
                    "measured_on": found.get("device", ""),
                }


def training_rows(measured: dict[tuple[str, str, int, int], Row]) -> Iterator[Row]:
    """The points, in their order."""
    speed = coefficients()

    def rate(point: Point, **changes: Any) -> float:
        return time.tokens_per_gpu(point.run.change(**changes), speed)

    for p in all_candidates():
        alone: Row = {"gpus": 1, "tensor_parallel": 1, "context_parallel": 1, "pipeline_parallel": 1, "cp_comm_type": "p2p"}
        config = p.run.config
        found = measured.get((p.folder, p.attention, p.seq_length, p.context_parallel), {})
        yield {
            **{
                "folder": p.folder,
                "attention": p.attention,
                "N": p.seq_length,
                "levels": config.levels,
                "budget": config.budget,
            },
            **{"context_parallel": p.context_parallel, "tensor_parallel": p.tensor_parallel},
            **{"pipeline_parallel": p.pipeline_parallel, "gpus": p.gpus, "recompute": p.recompute, "scheme": p.cp_comm_type},
            **{"seconds_a_step": p.step, "tokens_s_gpu": rate(p), "efficiency": rate(p) / rate(p, **alone)},
            "times_dense": rate(p) / rate(p, attention="dense"),
            "peak_gib": memory.total(p.run) / 2**30,
            "extrapolated": "yes" if p.gpus > MEASURED_RANKS else "",
            "left_out": p.left_out or "",
            **{"measured_tokens_s_gpu": found.get("tokens_s_gpu", ""), "measured_efficiency": found.get("efficiency", "")},
            **{"measured_peak_gib": found.get("peak_gib", ""), "measured_on": found.get("device", "")},
        }


def _read(folders: Sequence[Path], name: str) -> Iterator[tuple[Path, Row]]:
    for folder in folders:
        for table in sorted(folder.glob(f"**/{name}")):
            with table.open() as file:
                for row in csv.DictReader(file):
                    yield table, row


def measured_layers(folders: Sequence[Path]) -> dict[tuple[str, str, int], Row]:
    """Rows of times.csv by case, what and ranks, with the device that the times.json beside it names."""
    found: dict[tuple[str, str, int], Row] = {}
    for table, row in _read(folders, "times.csv"):
        name = json.loads(table.with_suffix(".json").read_text())["device"]
        device = next((key for key in DEVICES if key.upper() in name), name)
        _keep(found, (row["case"], row["what"], int(row["ranks"])), {**row, "device": device})
    return found


def _keep(found: dict[Any, Row], key: Any, row: Row) -> None:
    """Where several devices measured the same, that of the predictions."""
    if found.get(key, {}).get("device") != KIND or row.get("device") == KIND:
        found[key] = row


def measured_runs(folders: Sequence[Path]) -> dict[tuple[str, str, int, int], Row]:
    """Rows of scaling.csv by the point's folder, attention, length and context-parallel ranks.

    Efficiency is over one rank in the same table; where that was not measured there is none.
    """
    recompute = {(p.folder, p.attention, p.seq_length, p.context_parallel): p.recompute for p in all_candidates()}
    found: dict[tuple[str, str, int, int], Row] = {}
    named = {folder for folder, *_ in recompute}
    rows = list(_read(folders, "scaling.csv"))
    alike = ("recipe", "attention", "seq_length", "recompute", "device", "levels", "budget", "dense_first", "dense_last")
    alone = {(table, *(row.get(name) for name in alike)) for table, row in rows if row["context_parallel"] == "1"}
    for table, row in rows:
        if (table, *(row.get(name) for name in alike)) not in alone:
            row = {**row, "efficiency": ""}
        folder = table.parent.name if table.parent.name in named else "study"
        key = (folder, row["attention"], int(row["seq_length"]), int(row["context_parallel"]))
        if row["tokens_s_gpu"] and recompute.get(key) == row["recompute"]:
            _keep(found, key, row)
    return found


def panel(axes: Any, title: str, label: str, curves: Curves) -> None:
    """Dotted what is predicted, marks what was measured."""
    for number, (name, points) in enumerate(curves.items()):
        colour = f"C{number}"
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], ":", color=colour, label=name)
        marks = [(x, y) for x, _, y in points if y is not None]
        axes.plot([x for x, _ in marks], [y for _, y in marks], "o", color=colour)
    axes.axvspan(MEASURED_RANKS + 0.1, max(SIZES) + 0.2, color="black", alpha=0.05)
    axes.set(xticks=SIZES, xlabel="GPUs that share a sequence", ylabel=label, title=title, ylim=(0, None))
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    axes.spines[["top", "right"]].set_visible(False)


def draw(path: Path, layers: Sequence[Row], runs: Sequence[Row]) -> None:
    """Efficiency of a layer and of training, and times dense: dotted what the plan says, marks what was measured."""
    from matplotlib.figure import Figure

    one: Curves = {}
    for row in layers:
        if row["scheme"] in ("", "p2p"):
            known = float(row["measured_efficiency"]) if row["measured_efficiency"] else None
            one.setdefault(row["case"], []).append((row["ranks"], row["efficiency"], known))
    study = {(r["attention"], r["N"], r["context_parallel"]): r for r in runs if r["folder"] == "study"}
    training: Curves = {}
    over: Curves = {}
    for length in LENGTHS:
        name = f"{length:,} tokens"
        training[name], over[name] = [], []
        for ranks in SIZES:
            ours, dense = (study[attention, length, ranks] for attention in ("lighthouse", "dense"))
            fast, slow = ours["measured_tokens_s_gpu"], dense["measured_tokens_s_gpu"]
            known = float(ours["measured_efficiency"]) if ours["measured_efficiency"] else None
            training[name].append((ranks, ours["efficiency"], known))
            both = fast and slow and ours["measured_on"] == dense["measured_on"]
            over[name].append((ranks, ours["times_dense"], float(fast) / float(slow) if both else None))
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    panel(left, "One layer, p2p", "of one GPU's speed", one)
    panel(middle, "Training, Lighthouse", "of one GPU's tokens/s", training)
    panel(right, "Training, Lighthouse over dense", "× tokens/s", over)
    said = "Dotted: predicted, extrapolated beyond two GPUs (grey)."
    if devices := sorted({row["measured_on"] for row in [*layers, *study.values()] if row["measured_on"]}):
        said += f" Marks: measured on {' and '.join(f'{device.upper()}s' for device in devices)}."
    figure.suptitle(said, fontsize=9)
    figure.savefig(path, dpi=120)


def write(path: Path, rows: Sequence[Row]) -> None:
    """Floats to four digits."""
    write_csv(path, [{k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling" / "predicted")
    parser.add_argument("--measured", type=Path, nargs="*", default=[RESULTS / "scaling", RESULTS / "context_parallel"])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    layers = list(attention_rows(measured_layers(options.measured)))
    runs = list(training_rows(measured_runs(options.measured)))
    written = [options.out / name for name in ("attention.csv", "training.csv", "predicted.png")]
    write(written[0], layers)
    write(written[1], runs)
    draw(written[2], layers, runs)
    measured = sum(bool(row["measured_on"]) for row in [*layers, *runs])
    print(f"{len(layers)} layers and {len(runs)} runs predicted, {measured} of them measured too")
    print(f"written: {', '.join(map(str, written))}")


if __name__ == "__main__":
    main()
