"""Draws docs/images/context-parallel.png, the picture of docs/context_parallel.md: `python docs/draw_context_parallel.py`."""

from __future__ import annotations

from pathlib import Path

import numpy
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from PIL import Image

from megatron_lighthouse.sequence.layout import Layout

RANKS, SHOWN = 4, 1
"""C, and the rank that is followed."""
CHUNKS = 2 * RANKS
COLOURS = ("#c9790a", "#d1495b", "#66509b", "#35759c")
"""Of what a rank holds."""
STEP, DARK, FAINT = "#e4e4e8", "#1b1f3b", "#9a9aa5"
"""Of a step that nothing crosses ranks in, of text and outlines, of arrows."""


def holder(chunk: int) -> int:
    return Layout(RANKS, 0).owner(chunk)


def draw(path: Path) -> None:
    figure = Figure(figsize=(9, 8.0), dpi=140)
    canvas = FigureCanvasAgg(figure)
    _chunks(figure.add_axes((0.02, 0.845, 0.96, 0.125)))
    _triangle(figure.add_axes((0.065, 0.385, 0.37, 0.416)))
    _received(figure.add_axes((0.475, 0.385, 0.515, 0.416)))
    _times(figure.add_axes((0.02, 0.005, 0.96, 0.288)))
    canvas.draw()
    pixels = Image.fromarray(numpy.asarray(canvas.buffer_rgba())).convert("RGB")
    pixels.quantize(64, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)


def _chunks(axes: Axes) -> None:
    """The sequence, whose chunk is whose, and where the halo goes."""
    _blank(
        axes, f"The tokens: {CHUNKS} chunks for {RANKS} ranks; rank r holds chunks r and {CHUNKS - 1} − r", (0, CHUNKS), (0, 1)
    )
    for chunk in range(CHUNKS):
        _box(axes, chunk, 0.30, 1, 0.36, COLOURS[holder(chunk)], f"chunk {chunk}\nrank {holder(chunk)}", "white")
        if chunk < CHUNKS - 1:
            _arrow(axes, (chunk + 0.9, 0.66), (chunk + 1.1, 0.66), bend=-1.3)
    axes.text(
        0, 0.13, "arrows: the halo, rows of the windows that end with a chunk, goes to the next chunk's rank", va="center"
    )


def _triangle(axes: Axes) -> None:
    """Whose queries attend to whose keys, and in which step."""
    axes.set(xlim=(0, CHUNKS), ylim=(CHUNKS, 0), aspect="equal", xlabel="chunk of the keys", ylabel="chunk of the queries")
    axes.set_title("Who attends to whom, in which step", loc="left", fontsize=10, weight="bold")
    for query in range(CHUNKS):
        for key in range(query + 1):
            step = (holder(query) - holder(key)) % RANKS
            if key == query:
                corners = [(key, query), (key, query + 1), (key + 1, query + 1)]
                axes.fill(*zip(*corners, strict=True), color=COLOURS[holder(key)], linewidth=0)
                place = key + 0.3, query + 0.7
            else:
                axes.add_patch(Rectangle((key, query), 1, 1, facecolor=COLOURS[holder(key)], edgecolor="white", linewidth=0.6))
                place = key + 0.5, query + 0.5
            axes.text(*place, str(step), ha="center", va="center", color="white")
    for query in Layout(RANKS, SHOWN).chunks:
        axes.add_patch(Rectangle((0, query), query + 1, 1, fill=False, edgecolor=DARK, linewidth=2.2, clip_on=False))
    names = [f"{chunk}" for chunk in range(CHUNKS)]
    at = [chunk + 0.5 for chunk in range(CHUNKS)]
    axes.set_xticks(at, names)
    axes.set_yticks(at, names)
    axes.tick_params(length=0)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.text(CHUNKS, 0.45, "colour: the rank of the keys", ha="right", va="center")
    axes.text(CHUNKS, 1.0, "number: the step", ha="right", va="center")
    axes.text(CHUNKS, 1.55, f"outlined: queries of rank {SHOWN}", ha="right", va="center")


def _received(axes: Axes) -> None:
    """What the shown rank receives in each step, and what reads it."""
    _blank(axes, f"The ring, as rank {SHOWN} sees it", (0, 10), (CHUNKS, 0))
    early, late = Layout(RANKS, SHOWN).chunks
    for step in range(RANKS):
        rank, y = (SHOWN - step) % RANKS, 0.35 + 1.75 * step
        chunks = Layout(RANKS, rank).chunks[: 1 if rank < SHOWN else 2]
        for i, chunk in enumerate(chunks):
            _box(axes, 1.5 + 0.9 * i, y, 0.85, 1.0, COLOURS[rank], str(chunk), "white")
        axes.text(0, y + 0.5, f"step {step}", va="center", weight="bold")
        if step == 0:
            lines = "its own keys, causally,", "while the first of the others travel"
        elif rank < SHOWN:
            lines = f"from rank {rank}, a lower rank: its early chunk alone,", f"read by the queries of {early} and {late}"
        else:
            lines = f"from rank {rank}, a higher rank: both its chunks,", f"read by the queries of {late} alone"
        axes.text(3.6, y + 0.5, "\n".join(lines), va="center", linespacing=1.35)
    note = "Every step is two squares of work, on every rank.\nThe parts are merged by their log-sum-exp."
    axes.text(0, 7.5, note, va="center", linespacing=1.35)


def _times(axes: Axes) -> None:
    """Forward and backward of the shown rank: what its GPU does, and what is on the wire."""
    _blank(axes, f"In time, on rank {SHOWN}: what its GPU does, and below that what travels meanwhile", (-0.75, 13), (7.9, 0.3))
    order = [(SHOWN - step) % RANKS for step in range(1, RANKS)]
    work = [("score", 1), ("select", 1), ("gather\nK, V", 1.25), ("gather\nQ", 1.25)]
    _forward(axes, 0.5, work, order)
    _backward(axes, 4.2, order)


def _forward(axes: Axes, y: float, work: list[tuple[str, float]], order: list[int]) -> None:
    axes.text(-0.75, y + 0.75, "for-\nward", va="center", weight="bold")
    x = 0.0
    for name, width in work:
        _box(axes, x, y, width, 1.5, STEP, name)
        x += width
    keys = x - work[-1][1]
    attends = _attends(axes, x, y, [SHOWN, *order])
    end = x + 1.55 * RANKS
    _box(axes, end, y, 13 - end, 1.5, STEP, "scatter\n(halo last)")
    begins = [keys, attends[1], attends[2]]
    ends = [attends[1], attends[2], attends[3]]
    for rank, begin, until in zip(order, begins, ends, strict=True):
        _box(axes, begin, y + 1.75, until - begin, 0.85, COLOURS[rank], f"K, V of {rank}", "white", 0.06)
    _box(axes, end, y + 1.75, 1.3, 0.85, "white", "halo", DARK, 0.06)


def _backward(axes: Axes, y: float, order: list[int]) -> None:
    axes.text(-0.75, y + 0.75, "back-\nward", va="center", weight="bold")
    _box(axes, 0, y, 2.25, 1.5, STEP, "scatter backward\n(halo first)")
    attends = _attends(axes, 2.25, y, [*order, SHOWN])
    end = 2.25 + 1.55 * RANKS
    _box(axes, end, y, 1.5, 1.5, STEP, "gather\nbackward Q")
    _box(axes, end + 1.5, y, 1.5, 1.5, STEP, "gather\nbackward K, V")
    begins = [0.0, attends[0], attends[1]]
    for rank, begin, until in zip(order, begins, attends, strict=False):
        _box(axes, begin, y + 1.75, until - begin, 0.85, COLOURS[rank], f"K, V of {rank}", "white", 0.06)
    # the last wait for the rank's own attention, and go beside a kernel that leaves them room
    begins, ends = [attends[1], attends[2], end], [attends[2], attends[3], end + 1.5]
    for rank, begin, until in zip(order, begins, ends, strict=True):
        _box(axes, begin, y + 2.7, until - begin, 0.85, "white", f"grads to {rank}", COLOURS[rank], 0.06)
    _box(axes, 0.75, y + 2.7, 1.5, 0.85, "white", "halo's grad", DARK, 0.06)


def _attends(axes: Axes, x: float, y: float, ranks: list[int]) -> list[float]:
    """Boxes of attention to the keys of `ranks`; returns where they begin."""
    places = [x + 1.55 * i for i in range(len(ranks))]
    for place, rank in zip(places, ranks, strict=True):
        name = "attend\nto its own" if rank == SHOWN else f"attend\nto rank {rank}"
        _box(axes, place, y, 1.55, 1.5, COLOURS[rank], name, "white")
    return places


def _box(
    axes: Axes, x: float, y: float, width: float, height: float, fill: str, text: str, ink: str = DARK, margin: float = 0
) -> None:
    edge = ink if fill == "white" else "white"
    place = x + margin, y
    axes.add_patch(Rectangle(place, width - 2 * margin, height, facecolor=fill, edgecolor=edge, linewidth=1.0))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=ink, linespacing=1.15)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], bend: float) -> None:
    style = f"arc3,rad={bend}"
    axes.add_patch(FancyArrowPatch(start, end, connectionstyle=style, arrowstyle="-|>", mutation_scale=9, color=FAINT))


def _blank(axes: Axes, title: str, xlim: tuple[float, float], ylim: tuple[float, float]) -> None:
    axes.set(xlim=xlim, ylim=ylim)
    axes.set_title(title, loc="left", fontsize=10, weight="bold")
    axes.axis("off")


if __name__ == "__main__":
    from matplotlib import rc_context

    with rc_context({"font.size": 8.5, "font.family": "DejaVu Sans", "text.color": DARK, "axes.labelcolor": DARK}):
        draw(Path(__file__).parent / "images" / "context-parallel.png")
