"""What a run costs, in a few lines: days, GPU-hours and layout, of both stages."""

from __future__ import annotations

import math

from megatron_lighthouse.plan import lengths, memory, time
from megatron_lighthouse.plan.coefficients import Coefficients
from megatron_lighthouse.plan.report import TIGHT, extrapolated, kind, layout, table
from megatron_lighthouse.plan.run import Run
from megatron_lighthouse.plan.search import Ranking
from megatron_lighthouse.plan.stages import Stages
from megatron_lighthouse.plan.words import layout_words

DAY = 86400.0
MORE = "--details: memory and time by part, links, all layouts, and what the model was held to"


def answer(name: str, stages: Stages, ranking: Ranking, tokens: float, speed: Coefficients, chose: bool) -> str:
    """The answer for these stages in their layout, which they fit, and the layout of `ranking` where that is sooner done.

    Args:
        chose: whether the plan chose how many sequences a step has.
    """
    run, seconds = stages.run, sum(stages.seconds(tokens, speed))
    size = f"{tokens / 1e9:,.3g}B tokens of {name} ({run.parameters / 1e6:,.0f}M parameters)"
    mark = extrapolated(run).replace("[", "[predicted, ") or " [predicted]"
    stage1, whole = gains(stages, speed)
    selects, assumed = run.variant.selects, run.work.assumed
    lines = [
        f"attention: {kind(run)}, scorer {run.config.scorer}" if selects else f"attention: {kind(run)}",
        f"documents: {run.documents.row(run.seq_length).words()}" if run.documents else "",
        f"gain: stage 1 {stage1:.1f} x {run.base.name}, the whole run {whole:.1f} x" if selects else "",
        f"{run.base.name} [predicted: {assumed}]" if assumed else "",
        f"layout: {layout(run)}, {run.global_batch} sequences a step{_chosen(run) if chose else ''}",
        f"steps: {_steps(stages, tokens)}",
        f"flags: {layout_words(run)}",
        *(f"stage {number}: {text}" for number, text in enumerate(map(_verdict, stages.runs), 1) if text),
        *_better(stages, ranking, tokens, speed),
        _longest(run, stages.fraction),
        MORE,
    ]
    first = f"{duration(seconds)}, {seconds * run.gpus / 3600:,.0f} GPU-hours{mark}"
    head = f"{size} at {run.seq_length:,} on {run.gpus} x {run.device.name}:\n{first}\n\n{_table(stages, tokens, speed)}\n"
    return "\n".join([head, *filter(None, lines)])


def _chosen(run: Run) -> str:
    return f" ({run.global_batch * run.seq_length / 1e6:,.1f}M tokens; chosen, for no --global-batch-size is given)"


def gains(stages: Stages, speed: Coefficients) -> tuple[float, float]:
    """Times as fast as dense in the same layout: stage 1, and the whole run."""
    dense = time.tokens_per_gpu(stages.dense, speed)
    return time.tokens_per_gpu(stages.run, speed) / dense, stages.tokens_per_gpu(speed) / dense


def _steps(stages: Stages, tokens: float) -> str:
    """How many, and the flags that say so to Megatron and to launch/two_stage.sh."""
    run = stages.run
    total = math.ceil(tokens / (run.global_batch * run.seq_length))
    first = round(stages.fraction * total) if run.variant.selects else 0
    if not 0 < first < total:
        return f"{total:,} (--global-batch-size {run.global_batch} --train-iters {total})"
    words = f"--stage1 {first} --total {total} -- --global-batch-size {run.global_batch}"
    return f"{total:,}, of which {first:,} in stage 1 (two_stage.sh {words})"


def _longest(run: Run, fraction: float) -> str:
    """What these GPUs could train, in whatever layout: of packed documents that is another question."""
    if run.documents or (found := lengths.of_gpus(run, fraction)) is None:
        return ""
    return f"longest context of these GPUs: {found.seq_length:,} tokens [predicted], by {layout(found)}"


def duration(seconds: float) -> str:
    """Days, or hours below two of them."""
    return f"{seconds / DAY:,.1f} days" if seconds >= 2 * DAY else f"{seconds / 3600:,.1f} hours"


def _table(stages: Stages, tokens: float, speed: Coefficients) -> str:
    """Each stage, and what dense attention throughout would take."""
    base = stages.run.base.name
    rows = [(f"stage {number}, {run.variant.title}", share, run) for number, (share, run) in enumerate(stages.shares, 1)]
    rows = [*rows, (f"{base} throughout", 1.0, stages.dense)] if stages.run.variant.selects else [(base, 1.0, stages.run)]
    cells: list[tuple[str, ...]] = []
    for title, share, run in rows:
        hours, need = share * tokens / time.tokens_per_gpu(run, speed) / 3600, memory.total(run) / 2**30
        room = f"{need:.1f}" + ("" if memory.fits(run) else ", does not fit")
        cells.append((title, f"{share:.0%}", f"{hours / run.gpus / 24:,.2f}", f"{hours:,.0f}", room))
    usable = stages.run.device.usable_bytes / 2**30
    return table(["", "tokens", "days", "GPU-hours", f"GiB of {usable:.0f}"], cells)


def _verdict(run: Run) -> str:
    return f"fits, but {TIGHT}" if memory.tight(run) else ""


def _better(stages: Stages, ranking: Ranking, tokens: float, speed: Coefficients) -> list[str]:
    if not ranking.layouts:  # it has what the ranking does not try, such as --cp-comm-type all_gather
        return []
    best, rate = ranking.recommended
    if best == stages.run:
        return []
    seconds, why = tokens / rate / best.gpus, "" if rate > stages.tokens_per_gpu(speed) else ", with more room"
    return [f"recommended: {layout(best)} ({duration(seconds)}{why}): {layout_words(best)}"]
