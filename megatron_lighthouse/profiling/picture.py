"""The table as stacked bars, one for each rank, written without a screen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_lighthouse.profiling.names import BETWEEN, COMMUNICATION, DENSE, DIRECTIONS, REST, ROWS
from megatron_lighthouse.profiling.report import IDLE, Rank

COLOURS = {
    "pool": "#8d99ae",
    "score": "#f2c14e",
    "select": "#f78154",
    "gather": "#4d9078",
    "attend": "#d1495b",
    "scatter": "#5fad56",
    BETWEEN: "#b5838d",
    COMMUNICATION: "#6a4c93",
    DENSE: "#2b3a67",
    REST: "#9fb8d0",
    IDLE: "#eeeeee",
}
HATCHES = {"forward": "", "recompute": "...", "backward": "///"}
SAID = {"recompute": "recomputed dotted", "backward": "backward hatched"}


def draw(found: Sequence[Rank], path: Path) -> None:
    """Bars of milliseconds: forward plain, recomputed dotted, backward hatched. Of communication only what is not hidden."""
    figure = Figure(figsize=(11, 1.8 + 0.45 * len(found)), layout="constrained")
    axes = figure.subplots()
    left, drawn = [0.0] * len(found), set[str]()
    places = range(len(found))
    others = sorted({row for rank in found for row, _ in rank.times.rows} - set(ROWS))
    for row in [*ROWS, *others, IDLE]:
        label: str | None = f"{row}, not hidden" if row == COMMUNICATION else row
        for direction in DIRECTIONS:
            widths = [_width(rank, row, direction) for rank in found]
            if not any(widths):
                continue
            drawn.add(direction)
            bars = axes.barh(places, widths, left=left, label=label, color=COLOURS.get(row, "#666666"))
            for bar in bars:
                bar.set(hatch=HATCHES[direction], edgecolor="white", linewidth=0.4)
            label, left = None, [x + width for x, width in zip(left, widths, strict=True)]
    axes.set_yticks(places, [rank.profile.name for rank in found])
    axes.invert_yaxis()
    hatched = [said for direction, said in SAID.items() if direction in drawn]
    axes.set_xlabel("; ".join([f"ms of {'CPU' if found[0].profile.on_cpu else 'GPU'} an iteration", *hatched]))
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, ncols=5, loc="outside upper center")
    FigureCanvasAgg(figure).print_png(str(path))


def _width(rank: Rank, row: str, direction: str) -> float:
    if row == IDLE:
        return rank.times.idle if direction == "forward" else 0.0
    if row == COMMUNICATION:
        return rank.times.exposed.get(direction, 0.0)
    return rank.times.rows.get((row, direction), 0.0)
