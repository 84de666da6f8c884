"""`python -m megatron_lighthouse.recipe.recovery --run-folder RUN [--dense RUN2]`: what the switch to dense attention cost.

Reads the TensorBoard log of a run that switched in one job (`--lighthouse-stage2-at`) or between two, in one folder or in one
for each attention, as of `recipe.two_stage`. Leaves recovery.csv and recovery.png.

Definitions, ours; W is --smooth, and losses are the training losses that were logged:
- smoothed: the mean of a loss and of up to W - 1 before it in the same stage, so that no mean has both attentions in it.
  A dense warm-up is of neither.
- level: the last smoothed loss of stage 1; scatter: the standard deviation of the W losses in it, to judge the spike by.
- spike: the highest single loss from the switch to the W-th loss after all layers are dense, less the level.
- dense's own spike: the same of the dense run, which has no switch: what single losses scatter by alone.
- recovered: in the first iteration, from that of the spike on, whose smoothed loss is at most the level; up to W - 1 losses
  late, for the mean lags. Without a spike above 0: after 0 iterations.
- final loss: the last smoothed loss. Gap: the mean of the last W losses less that of the dense run in the same iterations.
- level with dense: in the first iteration in which the mean of W such differences, all since the spike, is at most 0. A part of
  stage 1's level is hindsight (docs/evaluation.md), and may be out of reach.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from megatron_lighthouse.needed import ask_for_megatron
from megatron_lighthouse.recipe.comparable import check_comparable, unit
from megatron_lighthouse.recipe.recovery_log import STAGES, Run, logs, read_losses, read_run
from megatron_lighthouse.recipe.whole_log import Losses, check_around, check_finite, check_since, said_of, width_of
from megatron_lighthouse.usage import Parser


@dataclass(frozen=True)
class Recovery:
    """The measures that this module defines."""

    level: float
    scatter: float
    spike: float
    spike_iteration: int
    recovered: int | None
    """The iteration; None where the run ends before."""
    final: float
    final_iteration: int


def smoothed(losses: Losses, width: int) -> Losses:
    """The mean of each loss and up to `width` - 1 before it."""
    values = list(losses.values())
    return {i: float(numpy.mean(values[max(0, n + 1 - width) : n + 1])) for n, i in enumerate(losses)}


def measure(losses: Losses, switch: int, dense_from: int, width: int, warmup: int = 0) -> Recovery:
    """Measure a run whose layers all use Lighthouse up to iteration `switch`, and are all dense from `dense_from` on.

    Its losses up to iteration `warmup`, when all were dense too, are of neither stage.

    Raises:
        ValueError: no loss on one side of the switch, or losses that cannot be judged by.
    """
    check_finite(losses)
    losses = {i: x for i, x in losses.items() if i > warmup}
    before, after = ({i: x for i, x in losses.items() if (i > switch) == later} for later in (False, True))
    if not before or not after:
        where, what = ("after", "stage 2 is") if before else ("up to", "stage 1 is")
        raise ValueError(
            f"there is no loss {where} iteration {switch}, the last with Lighthouse: {what} missing, or --switch wrong."
        )
    check_around(losses, switch, width, warmup)
    last = list(before.values())[-width:]
    level, scatter = float(numpy.mean(last)), float(numpy.std(last))
    mean = smoothed(after, width)
    peak = max(near_the_switch(after, dense_from, width), key=lambda i: after[i])
    spike = after[peak] - level
    back = next((i for i in after if i >= peak and mean[i] <= level), None) if spike > 0 else switch
    end = max(after)
    return Recovery(level, scatter, spike, peak, back, mean[end], end)


def near_the_switch(after: Iterable[int], dense_from: int, width: int) -> list[int]:
    """Of iterations after the switch those up to the `width`-th one from iteration `dense_from` on."""
    after = sorted(after)
    return [*(i for i in after if i < dense_from), *[i for i in after if i >= dense_from][:width]]


def own_spike(losses: Losses, dense: Losses, switch: int, dense_from: int, width: int, warmup: int = 0) -> float | None:
    """What the definition of `losses`' spike gives of `dense`, in the same iterations; None where one of them is missing."""
    before = [i for i in losses if warmup < i <= switch][-width:]
    near = near_the_switch((i for i in losses if i > switch), dense_from, width)
    if not before or not near or not dense.keys() >= {*before, *near}:
        return None
    return max(dense[i] for i in near) - float(numpy.mean([dense[i] for i in before]))


def gap(losses: Losses, dense: Losses, width: int) -> tuple[float, float, int]:
    """The mean of the last `width` losses that both have, less the dense run's; that of the dense run; the last iteration.

    Raises:
        ValueError: runs that have no iteration in common.
    """
    common = sorted(losses.keys() & dense.keys())[-width:]
    if not common:
        raise ValueError("the run and --dense have no logged iteration in common: give runs of the same --log-interval.")
    ours, theirs = (float(numpy.mean([x[i] for i in common])) for x in (losses, dense))
    return ours - theirs, theirs, common[-1]


def caught_up(losses: Losses, dense: Losses, spike_iteration: int, width: int) -> int | None:
    """The iteration in which a run is level with `dense`; None where it is not by its end."""
    above = {i: x - dense[i] for i, x in losses.items() if i >= spike_iteration and i in dense}
    return next((i for i, mean in [*smoothed(above, width).items()][width - 1 :] if mean <= 0), None)


def report(run: Run, measured: Recovery, dense: Losses | None, width: int) -> dict[str, Any]:
    """The row of recovery.csv; empty where something is not known.

    Raises:
        ValueError: `run` and `dense` have no iteration in common.
    """
    row: dict[str, Any] = {"warmup": run.warmup, "switch": run.switch, "dense_from": run.dense_from}
    row |= {name: getattr(measured, name) for name in ("level", "scatter", "spike", "spike_iteration")}
    level = caught_up(run.losses, dense, measured.spike_iteration, width) if dense else None
    for what, iteration in (("recover", measured.recovered), ("catch_up", level)):
        iterations = None if iteration is None else iteration - run.switch
        row[f"iterations_to_{what}"] = iterations
        row[f"tokens_to_{what}"] = None if iterations is None or run.tokens is None else iterations * run.tokens
    where = (run.switch, run.dense_from, width, run.warmup)
    row |= {"dense_spike": own_spike(run.losses, dense, *where) if dense else None}
    row |= {"final_iteration": measured.final_iteration, "final_loss": measured.final}
    found = gap(run.losses, dense, width) if dense else (None, None, None)
    return row | dict(zip(("gap", "dense_loss", "gap_iteration"), found, strict=True))


def table(row: dict[str, Any]) -> str:
    """The row for a reader."""

    def after(what: str) -> str:
        iterations, tokens = (row[f"{unit}_to_{what}"] for unit in ("iterations", "tokens"))
        if iterations is None:
            return "not within the run"
        return f"{iterations:,} iterations" + ("" if tokens is None else f", {tokens:,} tokens")

    lines = [("dense warm-up to", f"{row['warmup']:,}")] if row["warmup"] else []
    lines += [
        ("Lighthouse to iteration", f"{row['switch']:,}"),
        ("all layers dense from", f"{row['dense_from']:,}"),
        ("level before the switch", f"{row['level']:.4f}, single losses scatter by {row['scatter']:.4f}"),
        ("spike above it", f"{row['spike']:+.4f} at iteration {row['spike_iteration']:,}"),
        *([] if row["dense_spike"] is None else [("dense's own, there", f"{row['dense_spike']:+.4f}")]),
        ("back at the level after", after("recover")),
        ("final loss", f"{row['final_loss']:.4f} at iteration {row['final_iteration']:,}"),
    ]
    if row["gap"] is not None:
        at = f"(which has {row['dense_loss']:.4f} at iteration {row['gap_iteration']:,})"
        lines.append(("level with dense after", after("catch_up")))
        lines.append(("above dense from scratch", f"{row['gap']:+.4f} {at}"))
    return "\n".join(f"{name:<24} {value}" for name, value in lines)


def draw(run: Run, measured: Recovery, dense: Losses | None, width: int, path: Path, title: str, of: str) -> None:
    """Draw the losses, faint, and smoothed by stage; the switch, the level, and where the run is back at it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from megatron_lighthouse.plots import STAGE_COLOURS

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    if dense:
        mean = smoothed(dense, width)
        axes.plot(list(mean), list(mean.values()), color="#999999", label="dense from scratch")
    begins, ends = (0, run.warmup, run.switch), (run.warmup, run.switch, max(run.losses))
    names = ("dense warm-up", *(f"stage {n}, {stage}" for n, stage in enumerate(STAGES, 1)))
    for name, stage, begin, end in zip(names, (STAGES[1], *STAGES), begins, ends, strict=True):
        part = {i: x for i, x in run.losses.items() if begin < i <= end}
        if not part:
            continue
        mean, colour = smoothed(part, width), STAGE_COLOURS[stage]
        axes.plot(list(part), list(part.values()), color=colour, alpha=0.25, linewidth=1)
        axes.plot(list(mean), list(mean.values()), color=colour, label=f"{name} (mean of {width})")
    axes.axvline(run.switch + 0.5, color="#999999", linestyle=":", label=f"switch after {run.switch:,}")
    axes.hlines(
        measured.level, run.switch, measured.final_iteration, color="#999999", linestyle="--", linewidth=1, label="level"
    )
    if measured.recovered is not None and measured.spike > 0:
        label = f"back after {measured.recovered - run.switch:,} iterations"
        axes.plot([measured.recovered], [measured.level], "o", color="#f2a93b", label=label)
    axes.set(xlabel="iteration", ylabel=f"training loss (nats per {of})", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    FigureCanvasAgg(figure).print_png(str(path))


def main(argv: Sequence[str] | None = None) -> int:
    """Report on the run that the command line names; answers an exit status."""
    parser = Parser(prog="python -m megatron_lighthouse.recipe.recovery", description=__doc__.split("\n")[0])
    add = parser.add_argument_group("one of these").add_mutually_exclusive_group(required=True).add_argument
    add(
        "--run-folder",
        dest="run",
        type=Path,
        metavar="RUN",
        help="folder of the run, of its checkpoints or of its TensorBoard log",
    )
    add("folder", type=Path, metavar="RUN", nargs="?", help="the same")
    parser.add_argument("--dense", type=Path, metavar="RUN2", help="a run that was dense from the start")
    parser.add_argument("--switch", type=int, metavar="ITER", help="last iteration with Lighthouse, where the log does not say")
    parser.add_argument("--smooth", type=int, default=10, metavar="W", help="losses in a mean (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where recovery.csv and recovery.png go (default: RUN)")
    options = parser.parse_args(argv)
    options.run = options.run or options.folder
    ask_for_megatron("megatron_lighthouse.recipe.recovery", ["tensorboard", *(["megatron.core"] if options.dense else [])])
    try:
        if options.smooth < 1:
            raise ValueError(f"--smooth {options.smooth} must be at least 1: use 10, or more where single losses scatter.")
        run = read_run(options.run, options.switch)
        width, why = width_of(run.losses, run.switch, options.smooth, run.warmup)
        with said_of(options.run):
            measured = measure(run.losses, run.switch, run.dense_from, width, run.warmup)
        dense = read_losses(logs(options.dense))[0] if options.dense else None
        check_comparable(logs(options.run), logs(options.dense) if options.dense else [])
        with said_of(options.dense):
            check_finite(dense or {})
            check_since(dense or {}, run.switch)
        row = report(run, measured, dense, width)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    (out := options.out or options.run).mkdir(parents=True, exist_ok=True)
    with (out / "recovery.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["run", "smooth", *row])
        writer.writeheader()
        writer.writerow({"run": options.run.name, "smooth": width, **row})
    draw(run, measured, dense, width, out / "recovery.png", str(options.run), unit(logs(options.run)[-1]))
    print(f"{options.run}, means of {width} losses{why}\n{table(row)}\n{out / 'recovery.csv'}, {out / 'recovery.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
