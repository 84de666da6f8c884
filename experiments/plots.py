"""Pictures of an experiment: `python -m experiments --draw FOLDER`."""

from __future__ import annotations

import re
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.pairs import dense_of, pairs, positions
from experiments.run import REFERENCE
from experiments.runs import SECOND_SEED
from experiments.study_table import table_of, trained_shorter
from experiments.tables import Results
from megatron_lighthouse.recipe.evaluation_plots import middle
from megatron_lighthouse.recipe.printed_log import steady
from megatron_lighthouse.recipe.probe import CHANCE, Probe
from megatron_lighthouse.recipe.probes import PROBES
from megatron_lighthouse.recipe.recovery import smoothed
from megatron_lighthouse.ticks import from_zero

MAPS = 6
"""Maps of a probe side by side: more could not be read in a page."""
PALETTE = """
    #2b3a67 #d1495b #6d8fd1 #e8a04c #3a9d8f #8d6cab #7a9e3c #8a6d3b #d37fb0 #5f6c7b #c9b037 #37b6c9
    #000000 #f28e8e #1f5f99 #b35c00 #0b5d4f #4b2e83 #bcd96b #5a3210 #8c1c62 #b8c0c8 #f4d35e #8fe3ee
""".split()


def colours(results: Results) -> dict[str, str]:
    """A colour for each run of the experiment, whichever of them are there."""
    return dict(zip(results.runs, PALETTE[: len(results.runs)], strict=True))


def draw(results: Results, out: Path) -> None:
    """loss.png, positions.png, one of each probe, cost.png, hindsight.png, telemetry.png and table.md, of what there is."""
    out.mkdir(parents=True, exist_ok=True)
    if results.tables["curves"]:
        _loss(results, out / "loss.png")
    if results.tables["sequences"]:
        _positions(results, out / "positions.png")
        if all(row["at_once"] == 1 for row in results.tables["runs"]):
            _cost(results, out / "cost.png")
    for probe in PROBES:
        if results.tables[probe.name]:
            _probe(probe, results, out / f"{probe.name}.png")
    if results.tables["hindsight"]:
        _hindsight(results, out / "hindsight.png")
    if results.tables["telemetry"]:
        _telemetry(results, out / "telemetry.png")
    text = table_of(results)
    (out / "table.md").write_text(text)
    print(text)


def _loss(results: Results, path: Path) -> None:
    """Smoothed training losses by iteration and by time, marked at the switches and where the loss is back; and less dense's.

    Runs of a seed read the same sequence in the same iteration, so that the last has none of the text's scatter in it.
    """
    timed = all(row["at_once"] == 1 for row in results.tables["runs"])
    figure = Figure(figsize=(18 if timed else 13, 4.8), layout="constrained")
    panels: list[Any] = [*figure.subplots(1, 3 if timed else 2)]
    by_iteration, *by_time, above = panels
    colour = colours(results)
    ends, tops, drawn = [], [], set[str]()
    for row in results.tables["runs"]:
        run, points = row["run"], results.of("curves", row["run"])
        if not points:
            continue
        mean = smoothed({point["iteration"]: point["loss"] for point in points}, row["smooth"])
        iterations, losses = list(mean), list(mean.values())
        warmup = row.get("warmup") or 0
        seconds = steady(points, row["switch"], row["dense_from"], warmup)
        x_of: tuple[list[Any], ...] = (iterations, list(accumulate(seconds)))
        marks = [(at, form) for at, form in ((warmup, "v"), (row["switch"], "o")) if at]
        if row["iterations_to_recover"]:
            marks.append((row["switch"] + row["iterations_to_recover"], "s"))
        for axes, x in zip((by_iteration, *by_time), x_of, strict=False):
            axes.plot(x, losses, color=colour[run], label=f"{run}: {row['title']}", linewidth=1.2)
            for iteration, form in marks:
                if iteration in mean:
                    i = iterations.index(iteration)
                    axes.plot([x[i]], [losses[i]], form, color=colour[run], fillstyle="none" if form == "s" else "full")
                    drawn.add(form)
        dense = results.losses(dense_of(results, run))
        differences = {
            point["iteration"]: point["loss"] - dense[point["iteration"]] for point in points if point["iteration"] in dense
        }
        if differences and run != SECOND_SEED:  # which reads other text than `dense` in the same iteration
            mean = smoothed(differences, row["smooth"])
            late = {i: x for i, x in mean.items() if i > row["steps"] // 10}
            above.plot(list(late), list(late.values()), color=colour[run], linewidth=1.2)
        ends.append(min(losses))
        tops += [mean[i] for i in [row["steps"] // 10] if i in mean]
    by_iteration.set_ylim(
        min(ends) - 0.03, max(tops, default=max(ends)) + 0.05
    )  # the fall at the start would flatten all that follows
    by_iteration.set(xlabel="iteration", ylabel="training loss, running mean (nats per byte)")
    meanings = {"v": "▼: Lighthouse begins\n", "o": "●: switch to dense", "s": "□: back at the level before it"}
    by_iteration.set_title("   ".join(meaning for form, meaning in meanings.items() if form in drawn))
    for axes in by_time:
        axes.set(xlabel="seconds of training, steady", ylim=by_iteration.get_ylim())
    above.set_yscale("symlog", linthresh=0.02)  # a spike is a hundred times what is left at the end
    above.axhline(0, color=colour[REFERENCE], linewidth=1)
    above.set(xlabel="iteration", title="above dense, in the same iterations")
    _tidy(figure, (by_iteration, *by_time, above))
    _save(figure, path)


def _positions(results: Results, path: Path) -> None:
    """Held-out loss by position, and what each run has above dense, with the standard error of the pairs.

    A line stands at the length that was trained, where the evaluation's is longer.
    """
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    colour = colours(results)
    rows = positions(results)
    for run in dict.fromkeys(row["run"] for row in rows):
        own = [row for row in rows if row["run"] == run]
        x = [middle(row) for row in own]
        left.plot(
            x, [row["loss"] for row in own], ".-", color=colour[run], label=f"{run}: {results.runs[run].title}", linewidth=1.2
        )
        if own[0]["above"] is not None:
            values, errors = ([row[name] for row in own] for name in ("above", "above_error"))
            right.errorbar(x, values, errors, fmt=".-", color=colour[run], capsize=2, linewidth=1.2)
    for axes, title in ((left, "held-out loss (nats per byte)"), (right, "above dense from scratch, in pairs")):
        from_zero(axes, [0, *(1 << power for power in range(max(row["stop"] for row in rows).bit_length()))])
        axes.set(xlabel="position in the sequence", title=title)
        for length in {facts["seq_length"] for facts in results.facts["runs"].values() if trained_shorter(facts)}:
            axes.axvline(length, color="grey", linestyle=":", linewidth=1)
    right.axhline(0, color=colour[REFERENCE], linewidth=1)  # after the scale, else its limits stay those of a linear one
    _tidy(figure, (left, right))
    _save(figure, path)


def _cost(results: Results, path: Path) -> None:
    """What each run cost and where it came out. The bars are the standard error of the difference to dense."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    colour = colours(results)
    errors = {row["run"]: row["standard_error"] for row in pairs(results) if row["against"].startswith(REFERENCE)}
    for row in results.tables["runs"]:
        if row["held_out_loss"] is None:
            continue
        run, x = row["run"], row["steady_seconds"] * row["ranks"]
        axes.errorbar([x], [row["held_out_loss"]], [errors.get(run) or 0], fmt="o", color=colour[run], capsize=3)
        axes.annotate(f" {run}", (x, row["held_out_loss"]), fontsize=8)
        if run == REFERENCE:
            axes.axhline(row["held_out_loss"], color=colour[run], linewidth=1, linestyle=":")
    axes.set(xlabel="GPU seconds of training", ylabel="held-out loss (nats per byte)")
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _probe(probe: Probe, results: Results, path: Path) -> None:
    """Accuracy, the probe's axis by length: a column a run, a row a filler; beyond MAPS runs in further rows."""
    rows, axis = results.tables[probe.name], probe.axis
    runs, fillers = (list(dict.fromkeys(row[name] for row in rows)) for name in ("run", "filler"))
    lengths, values = (sorted({row[name] for row in rows}) for name in ("length", axis.name))
    wide = min(len(runs), MAPS)
    high = -(-len(runs) // wide)
    figure = Figure(figsize=(1.6 + 2.6 * wide, 0.8 + 2.2 * len(fillers) * high), layout="constrained")
    maps = figure.subplots(len(fillers) * high, wide, squeeze=False)
    image: Any = None
    for (row_of_maps, column), axes in numpy.ndenumerate(maps):
        i, j = row_of_maps % len(fillers), row_of_maps // len(fillers) * wide + column
        if j >= len(runs):
            axes.set_axis_off()
            continue
        accuracy = numpy.full((len(values), len(lengths)), numpy.nan)
        for row in rows:
            if (row["filler"], row["run"]) == (fillers[i], runs[j]):
                accuracy[values.index(row[axis.name]), lengths.index(row["length"])] = row["accuracy"]
        image = axes.imshow(accuracy, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for (y, x), value in numpy.ndenumerate(accuracy):
            colour = "white" if value < 0.6 else "black"
            axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=8)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=7)
        axes.set_yticks(range(len(values)), [f"{value:{axis.form}}" for value in values], fontsize=7)
        axes.set_title(f"{runs[j]}, {fillers[i]}", fontsize=9)
    figure.colorbar(image, ax=maps.ravel().tolist(), label=f"right digits (chance: {CHANCE:.0%})")
    figure.supxlabel("tokens")
    figure.supylabel(axis.title)
    _save(figure, path)


def _hindsight(results: Results, path: Path) -> None:
    """The loss of the checkpoint at the switch, with Lighthouse, by how many true later tokens it is left."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    colour = colours(results)
    rows = results.tables["hindsight"]
    for run in dict.fromkeys(row["run"] for row in rows):
        own = [row for row in rows if row["run"] == run]
        x = [row["distance"] for row in own]
        for name, form, what in (("other", ".-", "other text after them"), ("true", ".:", "all later text as it is")):
            losses = [row[f"loss_{name}_future"] for row in own]
            axes.plot(x, losses, form, color=colour[run], label=f"{run}, {what}", linewidth=1.2)
    axes.set_xscale("symlog", base=2, linthresh=1)
    axes.set(xlabel="true later tokens that are there", ylabel="loss with Lighthouse attention (nats per byte)")
    _tidy(figure, (axes,))
    _save(figure, path)


def _telemetry(results: Results, path: Path) -> None:
    """What selection does in each logged layer, over training."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    shown = {
        "later-tokens/cut-50": "share of the selection in a tile's first half\nthat rests on its second half",
        "coverage/level-0": "coverage: share of tokens\ngathered singly, a head",
    }
    for axes, (measure, title) in zip(panels, shown.items(), strict=True):
        what, which = measure.split("/")
        rows = [
            row for row in results.tables["telemetry"] if re.fullmatch(f"lighthouse/{what}/layer-\\d+/{which}", row["name"])
        ]
        for run, name in dict.fromkeys((row["run"], row["name"]) for row in rows):
            own = [row for row in rows if (row["run"], row["name"]) == (run, name)]
            label = f"{run}, {name.split('/')[2].replace('-', ' ')}"
            axes.plot([row["iteration"] for row in own], [row["value"] for row in own], ".-", label=label)
        axes.set(xlabel="iteration", title=title)
    _tidy(figure, tuple(panels))
    _save(figure, path)


def _tidy(figure: Figure, panels: tuple[Any, ...]) -> None:
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside right center", fontsize=8)


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure).print_png(str(path))
