"""Pictures of an evaluation: loss by position, retrieval probes as heat maps, hindsight by distance.

Written as PNG, without a screen.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_lighthouse.recipe.probe import CHANCE, Probe
from megatron_lighthouse.ticks import from_zero


def middle(row: dict[str, Any]) -> float:
    """Of the positions in a bucket, `start` to `stop` - 1."""
    return (row["start"] + row["stop"] - 1) / 2


def loss_by_position(
    rows: Sequence[dict[str, Any]], path: Path, title: str, unit: str = "byte", within: str = "sequence"
) -> None:
    """Draw the mean loss of each bucket, and one standard error to either side, over the bucket's middle."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    losses, errors = ([row[name] for row in rows] for name in ("loss", "standard_error"))
    axes.errorbar([middle(row) for row in rows], losses, errors, fmt="o-", capsize=3)
    from_zero(axes, [0, *(1 << power for power in range(rows[-1]["stop"].bit_length()))])
    axes.set(xlabel=f"position in the {within}", ylabel=f"held-out loss (nats per {unit})", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def probe(asked: Probe, rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draw the accuracy of each cell, the probe's axis by length, a map for each filler."""
    axis = asked.axis
    fillers = list(dict.fromkeys(row["filler"] for row in rows))
    lengths, values = (sorted({row[name] for row in rows}) for name in ("length", axis.name))
    figure = Figure(figsize=(1.5 + (0.9 * len(lengths) + 1) * len(fillers), 1.8 + 0.45 * len(values)), layout="constrained")
    maps = figure.subplots(1, len(fillers), squeeze=False)[0]
    for axes, filler in zip(maps, fillers, strict=True):
        accuracy = numpy.zeros((len(values), len(lengths)))
        for row in (row for row in rows if row["filler"] == filler):
            accuracy[values.index(row[axis.name]), lengths.index(row["length"])] = row["accuracy"]
        image = axes.imshow(accuracy, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for (i, j), value in numpy.ndenumerate(accuracy):
            axes.text(j, i, f"{value:.0%}", ha="center", va="center", color="white" if value < 0.6 else "black")
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(values)), [f"{value:{axis.form}}" for value in values])
        axes.set(xlabel="tokens", ylabel=axis.title, title=filler)
    figure.colorbar(image, ax=maps.tolist(), label=f"right digits (chance: {CHANCE:.0%})")
    figure.suptitle(title)
    _save(figure, path)


def hindsight(rows: Sequence[dict[str, Any]], path: Path, title: str, unit: str = "byte") -> None:
    """Draw what the loss gains from the tokens beyond each distance, and one standard error to either side."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    gains, errors = ([row[name] for row in rows] for name in ("difference", "standard_error"))
    axes.axhline(0, color="0.7", linewidth=1)
    axes.errorbar(range(len(rows)), gains, errors, fmt="o-", capsize=3)
    axes.set_xticks(range(len(rows)), [str(row["distance"]) for row in rows])
    axes.set(xlabel="later tokens left as they are", ylabel=f"hindsight (nats per {unit})", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure).print_png(str(path))
