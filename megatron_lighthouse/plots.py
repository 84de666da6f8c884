"""Pictures of a run: the loss over both stages, and what a layer selected. Written as PNG, without a screen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from megatron_lighthouse.event_files import check_whole

if TYPE_CHECKING:
    from megatron_lighthouse.lighthouse.selection import Selection

COLOURS = ("#f2a93b", "#d1495b", "#66509b", "#2b3a67", "#1b1f3b", "#0b0c16")
type Scalars = dict[str, tuple[numpy.ndarray[Any, Any], numpy.ndarray[Any, Any]]]
"""Per name, the steps and the values of a TensorBoard log."""
STAGE_COLOURS = {"lighthouse": "#d1495b", "dense": "#2b3a67"}


def selection_map(selection: Selection, path: Path, title: str) -> None:
    """Draw, for the first batch element, the finest level in which each head sees each token; and where the rows went.

    Of packed documents all rows, one after the other, with a line where a document ends.
    """
    import torch

    from megatron_lighthouse.lighthouse import telemetry
    from megatron_lighthouse.lighthouse.in_tiles import by_token
    from megatron_lighthouse.lighthouse.packed.packing import Packing

    geometry = selection.geometry
    finest = torch.full((selection.rows[0].shape[1], geometry.seq_length), geometry.levels - 1)
    for level in range(geometry.levels - 1, -1, -1):
        seen = by_token(geometry, selection.rows[level][0] >= 0, level).cpu()
        finest[seen] = level
    figure = Figure(figsize=(11, 1.8 + 0.35 * len(finest)), layout="constrained")
    wide, narrow = figure.subplots(1, 2, width_ratios=(4, 1))
    colours = _colours(geometry.levels)
    wide.imshow(
        finest.numpy(),
        aspect="auto",
        interpolation="nearest",
        cmap=ListedColormap(colours),
        vmin=-0.5,
        vmax=geometry.levels - 0.5,
    )
    if isinstance(geometry, Packing):
        for end in geometry.cu_seqlens[1:-1].tolist():
            wide.axvline(end - 0.5, color="white", linewidth=min(0.8, 60 / len(geometry.lengths)))  # of 8 inches at most 60/72
    wide.set(xlabel="token", ylabel="key/value head", yticks=range(len(finest)), title=f"{title}: finest level gathered")
    names = [f"level {level}: {_tokens(geometry.window(level))}" for level in range(geometry.levels)]
    figure.legend(
        handles=[Patch(color=c, label=n) for c, n in zip(colours, names, strict=True)],
        loc="outside lower center",
        ncols=geometry.levels,
        frameon=False,
    )
    counts = telemetry.entries_by_level(selection)
    narrow.bar(range(geometry.levels), counts, color=colours)
    narrow.set(xlabel="level", xticks=range(geometry.levels), title=f"{selection.length:,} rows gathered")
    _save(figure, path)


def _colours(levels: int) -> list[Any]:
    """One a level, from light to dark; shades between them where there are more levels than colours."""
    if levels <= len(COLOURS):
        return list(COLOURS[:levels])
    between = LinearSegmentedColormap.from_list("levels", COLOURS)
    return [between(level / (levels - 1)) for level in range(levels)]


def _tokens(count: int) -> str:
    return "single tokens" if count == 1 else f"windows of {count}"


def loss_curve(logs: Mapping[str, Scalars], path: Path, entropy: float | None = None, title: str = "") -> None:
    """Draw the training and validation loss of each stage.

    Args:
        logs: per attention, in the order of the stages, its log as `read_scalars` gives it.
        entropy: byte-frequency entropy of the text in nats a token, drawn as a line.
        title: what was run, and on what.
    """
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    end = None
    for attention, scalars in logs.items():
        if "lm loss" not in scalars:
            continue
        steps, values = scalars["lm loss"]
        colour = STAGE_COLOURS.get(attention, "#555555")
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
        axes.plot(steps, _running_mean(values), color=colour, label=f"{attention} (training, running mean)")
        if "lm loss validation" in scalars:
            axes.plot(*scalars["lm loss validation"], "o", color=colour, label=f"{attention} (validation)")
        if end is not None:
            axes.axvline(end + 0.5, color="#999999", linestyle=":", linewidth=1)
        end = steps[-1]
    if entropy is not None:
        axes.axhline(entropy, color="#999999", linestyle="--", linewidth=1, label="byte-frequency entropy")
    axes.set(xlabel="iteration", ylabel="loss (nats per byte)" if entropy is not None else "loss (nats per token)", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    _save(figure, path)


def _running_mean(values: numpy.ndarray[Any, Any], width: int = 10) -> numpy.ndarray[Any, Any]:
    """Mean of each value and up to `width` - 1 before it."""
    sums = numpy.concatenate([[0.0], numpy.cumsum(values)])
    ends = numpy.arange(1, len(values) + 1)
    starts = numpy.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)


def read_scalars(folder: Path) -> Scalars:
    """Per name, the steps and values in a TensorBoard log. Where a run went back to a checkpoint, only what it logged since
    counts from there on: what came after the checkpoint is no part of it.

    Raises:
        ValueError: as `check_whole`.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    check_whole(folder)
    log = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    log.Reload()
    scalars = {}
    for name in log.Tags()["scalars"]:
        steps: list[int] = []
        values: list[float] = []
        for event in sorted(log.Scalars(name), key=lambda e: e.wall_time):
            while steps and steps[-1] >= event.step:
                del steps[-1], values[-1]
            steps.append(event.step)
            values.append(event.value)
        scalars[name] = (numpy.array(steps), numpy.array(values))
    return scalars


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))
