"""The plan as plain text."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from statistics import mean
from typing import Any

from megatron_lighthouse.mcore.command_line import graphs
from megatron_lighthouse.plan import accuracy, lengths, memory, search, time
from megatron_lighthouse.plan.coefficients import Coefficients
from megatron_lighthouse.plan.device import H200, HELD_BACK
from megatron_lighthouse.plan.run import Run
from megatron_lighthouse.plan.stages import Stages
from megatron_lighthouse.plan.words import layout_words
from megatron_lighthouse.sequence.layout import Layout
from megatron_lighthouse.variant import Variant

SHOWN = 8
"""Layouts of the ranking that are shown."""
GRAPHS_HOLD = 0.08
"""Of what is held without them: 25.11 GiB for 23.23 (benchmarks/results/training_step/h200_graphs, `full_iteration`)."""
TIGHT = f"tight: less than {memory.PROMISED:.0%} room, which is what the count may be wrong by"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width; the first to the left, the others to the right."""
    lines = [list(map(str, row)) for row in [header, *rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in lines
    )


def whole(stages: Stages, found: search.Ranking, speed: Coefficients) -> str:
    """The report of a run: each stage in its layout, the ranking, and what the model is worth."""
    parts = []
    for run in stages.runs:
        parts += [title(run), memory_table(run), time_table(run, speed), link_table(run)]
    parts += [limits(stages.run, speed), ranking(stages.run, found, speed), errors(speed), published(speed)]
    return "\n\n".join(parts)


def extrapolated(run: Run) -> str:
    return "" if run.device.measured else " [extrapolated from H100 by datasheet ratios]"


def layout(run: Run) -> str:
    scheme = f" {run.cp_comm_type}" if run.context_parallel > 1 else ""
    sizes = f"TP {run.tensor_parallel} CP {run.context_parallel}{scheme} PP {run.pipeline_parallel} DP {run.data_parallel}"
    return f"{sizes}, {again(run)}"


def again(run: Run) -> str:
    """What it computes again in backward."""
    return f"recompute {run.recompute}" + (f", MLPs in tiles of {run.mlp_tile_tokens:,}" if run.mlp_tile_tokens else "")


def kind(run: Run) -> str:
    """The attention, and its sizes."""
    model, c = run.model, run.config
    if not run.variant.selects:
        return run.variant.title
    of = "" if run.base.native else f" around {run.base.title}"
    found = f"Lighthouse{of} in {run.lighthouse_layers} of {model.layers} layers (L={c.levels} p={c.pooling} k={c.budget}"
    return found + (f", k={run.edge_budget} in {model.layers - model.lighthouse_layers} of them)" if run.edge else ")")


def title(run: Run) -> str:
    return (
        f"{run.parameters / 1e6:,.0f}M parameters, {run.seq_length:,} tokens, {kind(run)}\n"
        f"{run.gpus} x {run.device.name}, {layout(run)}, {run.global_batch} sequences a step{extrapolated(run)}\n"
        f"device: {run.device.source}"
    )


def memory_table(run: Run) -> str:
    rows = [(name, f"{value / 2**30:.2f}") for name, value in memory.parts(run).items()]
    whole, usable = memory.total(run) / 2**30, run.device.usable_bytes / 2**30
    verdict = "DOES NOT FIT"
    if memory.fits(run):
        verdict = f"fits, but {TIGHT}" if memory.tight(run) else "fits"
    rows += [("all", f"{whole:.2f}"), (f"usable ({HELD_BACK:.0%} held back)", f"{usable:.2f}")]
    head, note = "memory per GPU", ""
    if run.pipeline_parallel > 1:
        head = f"memory per GPU of the {memory.stage_name(run)} of {run.pipeline_parallel} pipeline stages, the fullest"
        note = "\nthe embedding is the first stage's, logits and output weights are the last's"
    if graphs.kind_of(Namespace(**run.options)) != "none":
        note += f"\nCUDA graphs hold more, which is not counted: {GRAPHS_HOLD:.0%} of all where it was measured"
    return table([head, "GiB"], rows) + f"\n{verdict}{extrapolated(run)}{note}"


def time_table(run: Run, speed: Coefficients) -> str:
    parts = time.step_parts(run, speed)
    step = sum(parts.values())
    rows = [(name, f"{1e3 * x:.1f}", f"{x / step:.1%}") for name, x in parts.items() if x]
    rows.append(("all", f"{1e3 * step:.1f}", ""))
    rate = time.tokens_per_gpu(run, speed)
    which = "the last, with the logits" if parts["logits and loss"] else "one before the last, without logits"
    slowest = f", by the slowest pipeline stage ({which})" if run.pipeline_parallel > 1 else ""
    lines = [table([f"time of a step{slowest}", "ms", "share"], rows), host_lines(run, speed)]
    lines.append(f"{rate:,.0f} tokens/s/GPU, {rate * run.gpus:,.0f} in all{extrapolated(run)}")
    if run.variant.selects:
        dense = run.change(attention=run.base.name)
        other = time.tokens_per_gpu(dense, speed)
        note = "" if memory.fits(dense) else ", which would not fit in this layout"
        lines.append(f"{rate / other:.2f} x {run.base.name} ({other:,.0f} tokens/s/GPU{note})")
    if run.work.assumed:
        lines.append(f"{run.base.name} [predicted: {run.work.assumed}]")
    return "\n".join(lines)


def host_lines(run: Run, speed: Coefficients) -> str:
    """What the host costs the step, whose host that is, and the step without it."""
    alone = speed.without_host()
    step, rate = sum(time.step_parts(run, alone).values()), time.tokens_per_gpu(run, alone)
    hosts, whole = time.layer_host_seconds(run, speed), time.host_seconds(run, speed)
    if not whole:
        return "host: the GPU does not wait for it within CUDA graphs; between them it may, which is not counted"
    counts = map(sum, zip(*run.stages, strict=True))
    layer = " or ".join(dict.fromkeys(f"{1e3 * own:.1f}" for own, count in zip(hosts, counts, strict=True) if count))
    lines = [f"host: {layer} ms a layer, {1e3 * whole:,.0f} ms in all, as on {run.device.host}{_host(run)}"]
    if time.step_parts(run, speed)["host, exposed"]:
        lines += [f"by the GPU alone: {1e3 * step:.1f} ms, {rate:,.0f} tokens/s/GPU; a faster host or CUDA graphs come closer"]
    else:
        lines[0] += "; the GPU does not wait for it"
    return "\n".join(lines)


def _host(run: Run) -> str:
    """What of the host's time was not measured."""
    lacking = [] if run.device.measured or run.device.host == H200 else ["its own was not measured"]
    lacking += ["more than two context-parallel ranks are taken as two"] if run.context_parallel > 2 else []
    lacking += ["tensor parallelism is taken to cost it what the ring of two ranks does"] if run.tensor_parallel > 1 else []
    return f" [{'; '.join(lacking)}]" if lacking else ""


def link_table(run: Run) -> str:
    """Gigabytes that the busiest rank sends in a step, and over which link."""
    tensor, between, gradients = time.link_bytes(run)
    cp, layer, micro = run.context_parallel, run.layer, run.micro_batches
    crossing = 0.0
    if cp > 1:
        ranks = [Layout(cp, rank) for rank in range(cp)]
        forward = 1 + (run.recompute == "full")  # what is recomputed sends its forward's bytes again

        def sent_by(variant: Variant, config: Any) -> float:
            plans = [variant.sent(config, run.seq_length, layer, rank, run.cp_comm_type, run.around).values() for rank in ranks]
            return max(sum(forward * f + b for f, b in plan) for plan in plans)

        edge = run.config.replace(budget=run.edge_budget) if run.edge else None
        ends = sent_by(run.variant, edge) if edge else sent_by(run.base, run.around)
        ours = sent_by(run.variant, run.config) if run.lighthouse_layers else 0
        crossing = max(a * ends + b * ours for a, b in run.stages)
    rows = []
    for name, sent in (
        ("tensor parallel", tensor * micro),
        ("context parallel", crossing * micro),
        ("pipeline", between * micro),
        ("data parallel", gradients),
    ):
        link = "NVLink" if run.device.holds(run.spans[name]) else "network"
        rows.append((name, f"{sent / 1e9:.3f}", link if sent else "-"))
    note = (
        "\ncontext parallelism beyond 2 ranks is extrapolated: what each other rank costs was measured on 2" if cp > 2 else ""
    )
    return table(["a rank sends in a step", "GB", "over"], rows) + note


def limits(run: Run, speed: Coefficients) -> str:
    longest = lengths.of_layout(run)
    lines = [
        f"longest context of this layout and budget: {f'{longest:,} tokens' if longest else 'none fits'}{extrapolated(run)}"
    ]
    rows = search.crossover(run, speed)
    first = next((length for length, _, ratio in rows if ratio > 1), None)
    where = f"from {first:,} tokens on" if first else "at none of these lengths"
    lines.append(
        f"a Lighthouse layer is faster than a dense one {where} (forward + backward, GPU time; below 16K extrapolated):"
    )
    lines.append(table(["tokens", "k", "x dense"], [(f"{n:,}", str(k), f"{ratio:.1f}") for n, k, ratio in rows]))
    return "\n".join(lines)


def ranking(run: Run, found: search.Ranking, speed: Coefficients) -> str:
    """The layouts that fit both stages, and which is recommended."""
    refused = ", ".join(f"{count} by {name}" for name, count in found.refused.most_common())
    if not found.layouts:
        return f"no layout of {run.gpus} GPUs fits both stages (refused: {refused}): use more GPUs, or a shorter --seq-length."
    fullest = {id(r): Stages(r, found.fraction).fullest for r, _ in found.layouts}
    rows = []
    for r, rate in found.layouts[:SHOWN]:
        full = fullest[id(r)]
        rows.append((layout(r), f"{rate:,.0f}", f"{memory.total(full) / 2**30:.1f}", "tight" if memory.tight(full) else ""))
    best, alone = found.recommended, search.rank(run, speed.without_host(), found.fraction).recommended
    other = ""
    if alone[0] != best[0]:
        other = f"by the GPU alone the first would be {layout(alone[0])}, at {alone[1]:,.0f} tokens/s/GPU: the host decides\n"
    if memory.tight(fullest[id(best[0])]):
        other += f"all are {TIGHT}\n"
    elif any(map(memory.tight, fullest.values())):
        other += f"{TIGHT}; recommended is the fastest that is not, at {best[1]:,.0f} tokens/s/GPU\n"
    head = table([f"ranking of {len(found.layouts)} layouts that fit both stages", "tokens/s/GPU", "GiB", ""], rows)
    return f"{head}\nrefused: {refused or 'none'}{extrapolated(run)}\n{other}recommended: {layout_words(best[0])}"


def errors(speed: Coefficients, every: bool = False) -> str:
    """Greatest and mean error by group; the points themselves with `every`, else those out of bounds."""
    points = accuracy.compared(speed)
    rows, lines = [], []
    for group in dict.fromkeys(p.group for p in points):
        own = [p for p in points if p.group == group]
        bound = accuracy.BOUNDS.get(group)
        found = [abs(p.error) for p in own]
        outside = sum(e > bound for e in found) if bound else 0
        rows.append(
            (group, str(len(own)), f"{max(found):.1%}", f"{mean(found):.1%}", f"{bound:.0%}" if bound else "-", str(outside))
        )
        for p in own:
            if every or (bound and abs(p.error) > bound):
                lines.append((p.name, f"{p.measured:.6g}", f"{p.predicted:.6g}", f"{p.error:+.1%}"))
    text = table(["error of this model against measured points", "points", "greatest", "mean", "promised", "outside"], rows)
    return text + ("\n" + table(["point (s or GiB)", "measured", "model", "error"], lines) if lines else "")


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"


def published(speed: Coefficients) -> str:
    rows = [(p.name, number(p.measured), number(p.predicted), f"{p.error:+.0%}") for p in accuracy.published(speed)]
    head = table(["published, one B200 [extrapolated from H100 by datasheet ratios]", "paper", "model", "deviation"], rows)
    return head + (
        f"\nThe paper times the authors' code. On one H100 that is {accuracy.authors_over_dense():.0f} x dense at 491,520 "
        "tokens, forward (measured.csv):\nthe paper's ratios do not follow from datasheets. Trust B200 figures no further."
    )
