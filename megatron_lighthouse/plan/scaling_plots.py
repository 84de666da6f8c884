"""Plots of `scaling`: one picture a quantity, against context-parallel ranks and against length, written without a screen."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from megatron_lighthouse.plan.alike import Row, series
from megatron_lighthouse.ticks import along_log2

COLOURS = {"lighthouse": "#d1495b", "dense": "#2b3a67"}
OTHER, DARK, LIGHT = "#666666", 0.45, 0.65
"""Of any other attention; how far its lines go towards black, and towards white, where it has several."""
QUANTITIES = {
    "throughput": ("tokens_s_gpu", "predicted_tokens_s_gpu", "tokens/s/GPU"),
    "efficiency": ("efficiency", None, "tokens/s/GPU over that of the fewest ranks"),
    "memory": ("peak_gib", "predicted_peak_gib", "GiB at the peak"),
}
MARKERS = "osD^vP*X"
HEADROOM = 1.08
"""The height of a picture over its highest value, which would lie on the frame."""
WIDE, LINE = 45, 0.16
"""Letters of a name beyond which a legend has one column; inches of a line of it."""
ACROSS = {"context_parallel": "context-parallel ranks", "seq_length": "tokens of a sequence"}


def draw(rows: Sequence[Row], out: Path) -> list[str]:
    """The names of the pictures written; none for a quantity that no run has."""
    written = []
    for name, quantity in QUANTITIES.items():
        if figure := picture(rows, *quantity):
            FigureCanvasAgg(figure).print_png(str(out / f"{name}.png"))
            written.append(f"{name}.png")
    return written


def shades(attentions: Sequence[str]) -> list[tuple[float, float, float]]:
    """A colour for each line: that of its attention, from dark to light where this has several lines."""
    found = []
    for number, attention in enumerate(attentions):
        own, of = attentions[:number].count(attention), attentions.count(attention)
        step = 0.0 if of == 1 else own / (of - 1) * (DARK + LIGHT) - DARK
        base, end = to_rgb(COLOURS.get(attention, OTHER)), float(step > 0)
        red, green, blue = (channel + (end - channel) * abs(step) for channel in base)
        found.append((red, green, blue))
    return found


def picture(rows: Sequence[Row], measured: str, predicted: str | None, label: str) -> Figure | None:
    """A quantity along ranks and along length, the runs of each line all of one kind; None where no run has it.

    Where a line has several runs in one place it goes through their median, and each has its mark.
    """
    keys = ("attention", *ACROSS)
    rows = [r for r in rows if all(k in r for k in keys) and (r.get(measured) or (predicted and r.get(predicted)))]
    if not rows:
        return None
    panels = [(across, series(rows, across, other)) for across, other in zip(ACROSS, reversed(ACROSS), strict=True)]
    columns = 2 if all(len(name) < WIDE for _, lines in panels for name, _ in lines) else 1
    high = LINE * (1 + max(len(lines) for _, lines in panels) // columns)
    figure = Figure(figsize=(11, 4.8 + high), layout="constrained")
    for axes, (across, lines) in zip(figure.subplots(1, 2), panels, strict=True):
        colours = shades([str(runs[0]["attention"]) for _, runs in lines])
        for number, (name, runs) in enumerate(lines):
            style = {"color": colours[number], "marker": MARKERS[number % len(MARKERS)]}
            known = [(r[across], r[measured]) for r in runs if r.get(measured)]
            if known:
                axes.plot(*zip(*_medians(known), strict=True), **style, label=name)
                axes.plot(*zip(*known, strict=True), **style, linestyle="")
            thought = [(r[across], r[predicted]) for r in runs if predicted and r.get(predicted)]
            if thought:
                dotted = {**style, "linestyle": ":", "fillstyle": "none", "label": None if known else f"{name}, predicted"}
                axes.plot(*zip(*_medians(thought), strict=True), **dotted)
        if predicted and any(r.get(measured) and r.get(predicted) for r in rows):
            axes.plot([], [], ":", color="#666666", label="dotted: predicted")
        along_log2(axes, {r[across] for r in rows}, *([str] if across == "context_parallel" else []))
        axes.set_xlabel(ACROSS[across])
        axes.set_ylabel(label)
        axes.set_ylim(0, HEADROOM * axes.dataLim.ymax)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, ncols=columns, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    return figure


def _medians(points: Sequence[tuple[int, float]]) -> list[tuple[int, Any]]:
    return [(x, statistics.median(y for at, y in points if at == x)) for x in sorted({x for x, _ in points})]
