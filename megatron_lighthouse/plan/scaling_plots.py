"""Plots of `scaling`: one picture a quantity, against context-parallel ranks and against length, written without a screen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = {"lighthouse": "#d1495b", "dense": "#2b3a67"}
QUANTITIES = {
    "throughput": ("tokens_s_gpu", "predicted_tokens_s_gpu", "tokens/s/GPU"),
    "efficiency": ("efficiency", None, "tokens/s/GPU over that of the fewest ranks"),
    "memory": ("peak_gib", "predicted_peak_gib", "GiB at the peak"),
}
MARKERS = "osD^vP*X"


def draw(rows: Sequence[dict[str, Any]], out: Path) -> list[str]:
    """The names of the pictures written; none for a quantity that no run has."""
    return [f"{name}.png" for name in QUANTITIES if _picture(rows, out / f"{name}.png", *QUANTITIES[name])]


def _picture(rows: Sequence[dict[str, Any]], path: Path, measured: str, predicted: str | None, label: str) -> bool:
    keys = ("attention", "context_parallel", "seq_length")
    rows = [r for r in rows if all(k in r for k in keys) and (r.get(measured) or (predicted and r.get(predicted)))]
    if not rows:
        return False
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    recipes = {str(r.get("recipe")) for r in rows}
    for axes, across, other in zip(
        figure.subplots(1, 2), ("context_parallel", "seq_length"), ("seq_length", "context_parallel"), strict=True
    ):
        series = sorted({(str(r["attention"]), r[other], str(r.get("recipe"))) for r in rows})
        for number, (attention, value, recipe) in enumerate(series):
            own = sorted(
                (r for r in rows if (str(r["attention"]), r[other], str(r.get("recipe"))) == (attention, value, recipe)),
                key=lambda r: r[across],
            )
            name = f"{attention}, " + (f"{value:,} tokens" if other == "seq_length" else f"CP {value}")
            style = {"color": COLOURS.get(attention, "#666666"), "marker": MARKERS[number % len(MARKERS)]}
            known = [(r[across], r[measured]) for r in own if r.get(measured)]
            if known:
                axes.plot(*zip(*known, strict=True), **style, label=name + (f", {recipe}" if len(recipes) > 1 else ""))
            thought = [(r[across], r[predicted]) for r in own if predicted and r.get(predicted)]
            if thought:
                axes.plot(*zip(*thought, strict=True), **style, linestyle=":", fillstyle="none", label=f"{name}, predicted")
        ticks = sorted({r[across] for r in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{t:,}" for t in ticks])
        axes.minorticks_off()
        axes.set_xlabel("context-parallel ranks" if across == "context_parallel" else "tokens of a sequence")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    FigureCanvasAgg(figure).print_png(str(path))
    return True
