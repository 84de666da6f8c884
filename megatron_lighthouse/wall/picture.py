"""half-life.png: how long the channels of each head last."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

type Lives = Mapping[int, Mapping[int, Mapping[str, float]]]
"""By layer and head: 'p25', 'p50' and 'p75', in tokens."""
WRITTEN = 8
"""Heads that leave room for a number in each cell."""


def draw(lives: Lives, path: Path, title: str) -> None:
    """The median of each layer and head as a map; and beside it each head's quartiles, by layer."""
    layers, heads = [*lives], sorted({head for of_heads in lives.values() for head in of_heads})
    medians = numpy.full((len(layers), len(heads)), numpy.nan)
    for (i, j), _ in numpy.ndenumerate(medians):
        medians[i, j] = _finite(lives[layers[i]].get(heads[j], {}).get("p50", math.nan))
    figure = Figure(figsize=(11, 2 + 0.25 * len(layers)), layout="constrained")
    panels: list[Any] = [*figure.subplots(1, 2)]
    by_head, by_layer = panels
    image = by_head.imshow(medians, aspect="auto", cmap="viridis", norm=LogNorm(), interpolation="nearest")
    if len(heads) <= WRITTEN:
        for (i, j), value in numpy.ndenumerate(medians):
            colour = "white" if image.norm(value) < 0.6 else "black"
            by_head.text(j, i, f"{value:,.0f}", ha="center", va="center", color=colour, fontsize=7)
    by_head.set(xlabel="head of gates", ylabel="layer", yticks=range(len(layers)), yticklabels=layers)
    by_head.set(xticks=range(len(heads)), xticklabels=heads, title=f"half-life, median of channels: {title}")
    figure.colorbar(image, ax=by_head, label="tokens")
    for j, head in enumerate(heads):
        shift = (j + 0.5) / len(heads) * 0.8 - 0.4
        for layer, of_heads in lives.items():
            if head in of_heads:
                low, middle, high = (_finite(of_heads[head][name]) for name in ("p25", "p50", "p75"))
                by_layer.plot([layer + shift] * 2, [low, high], color="#6d8fd1", linewidth=1)
                by_layer.plot([layer + shift], [middle], ".", color="#2b3a67", markersize=4)
    by_layer.set_yscale("log")
    by_layer.set(xlabel="layer, its heads side by side", ylabel="tokens", title="quartiles of channels")
    by_layer.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))


def _finite(value: float) -> float:
    """A channel that never fades has no place on the axis."""
    return value if math.isfinite(value) else math.nan
