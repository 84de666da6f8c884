"""What each model gains at each length: the table of docs/models.md. Predicted, all of it."""

from __future__ import annotations

from megatron_lighthouse.plan import memory
from megatron_lighthouse.plan.answer import gains
from megatron_lighthouse.plan.coefficients import Coefficients
from megatron_lighthouse.plan.models import MORE, models, run_of_model
from megatron_lighthouse.plan.report import layout
from megatron_lighthouse.plan.run import Run
from megatron_lighthouse.plan.search import Ranking, rank
from megatron_lighthouse.plan.stages import FRACTION, Stages

LENGTHS = (2**15, 2**17, 2**19, 2**20)
NODE = 8
COLUMNS = ("model", "tokens", "B200s", "stage 1", "whole run", "GiB", "layout")


def table(speed: Coefficients) -> str:
    """In Markdown: a row for each model and length, or what of the model is not counted."""
    lines = [f"| {' | '.join(COLUMNS)} |", "| --- " * len(COLUMNS) + "|"]
    for name, one in models().items():
        if what := one.get("not_counted"):
            lines.append(f"| {one['title']} | – | | | | | not counted: {', '.join(f'`{flag}`' for flag in what)} |")
            continue
        for length in LENGTHS:
            run = run_of_model(name, length, gpus=NODE)
            lines.append(f"| {one['title']} | {_length(length)} | {' | '.join(_cells(run, speed))} |")
    return "\n".join(lines)


def _length(tokens: int) -> str:
    return f"{tokens // 2**20}M" if tokens >= 2**20 else f"{tokens // 2**10}K"


def _cells(run: Run, speed: Coefficients) -> list[str]:
    ranking = _fewest(run, speed)
    if not ranking.layouts:
        return [f"> {run.gpus * MORE[-1]}", "", "", "", "none fits"]
    best = ranking.recommended[0]
    stages = Stages(best, FRACTION)
    first, whole = gains(stages, speed)
    return [str(best.gpus), f"{first:.1f}×", f"{whole:.1f}×", f"{memory.total(stages.fullest) / 2**30:.0f}", layout(best)]


def _fewest(run: Run, speed: Coefficients) -> Ranking:
    """On as few nodes, by doubling, as have a layout for both stages."""
    for times in (1, *MORE):
        if (found := rank(run.change(gpus=run.gpus * times), speed)).layouts:
            break
    return found
