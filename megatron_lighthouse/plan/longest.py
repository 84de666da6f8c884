"""`plan --longest`: the longest context of a model on given GPUs, by what is computed again in backward, and its flags."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from megatron_lighthouse.plan import memory, search, time
from megatron_lighthouse.plan.coefficients import Coefficients
from megatron_lighthouse.plan.lengths import MOST, of_run
from megatron_lighthouse.plan.report import again, extrapolated, kind, layout, table
from megatron_lighthouse.plan.run import Run
from megatron_lighthouse.plan.words import layout_words


def answer(name: str, run: Run, layouts: Iterable[Run], given: Collection[str], speed: Coefficients) -> str:
    """In a few lines, and a row for each way of computing again.

    Args:
        run: of the model, with the GPUs.
        layouts: of these GPUs, at any length; one sequence a step.
        given: of levels and budgets, which stay those of `run`: for the others each length has its own.

    Raises:
        ValueError: no length fits.
    """

    def reach(one: Run) -> tuple[int, float]:
        return one.seq_length, time.tokens_per_gpu(one, speed)

    best: dict[tuple[str, bool], Run] = {}
    for one in layouts:
        if found := of_run(one, given, lambda run: not memory.tight(run)):
            way = found.recompute, bool(found.mlp_tile_tokens)
            best[way] = max(best.get(way, found), found, key=reach)
    if not best:
        raise ValueError(f"--gpus {run.gpus}: no length of this model fits: use more GPUs, or another --device.")
    rows = [_cells(one, given, speed) for _, one in sorted(best.items(), key=lambda item: item[1].seq_length)]
    found = max(best.values(), key=reach)
    sizes = f"--seq-length {found.seq_length} --max-position-embeddings {found.seq_length}"
    usable = run.device.usable_bytes / 2**30
    return "\n".join(
        [
            f"longest context of {name} ({run.parameters / 1e6:,.0f}M parameters) on {run.gpus} x {run.device.name}:",
            f"{found.seq_length:,} tokens{extrapolated(run).replace('[', '[predicted, ') or ' [predicted]'}",
            "",
            table(["", "tokens", "at most", f"GiB of {usable:.0f}", "s a step", "x dense"], rows),
            "",
            f"attention: {kind(found)}",
            f"layout: {layout(found)}, one sequence a step; the loss is taken in tiles by itself",
            f"flags, beside yours: {sizes} {layout_words(found)}",
            f"at most: by the count itself; what is recommended leaves the {memory.PROMISED:.0%} that it may be wrong by",
        ]
    )


def _cells(one: Run, given: Collection[str], speed: Coefficients) -> tuple[str, ...]:
    most = of_run(one, given, memory.fits) or one
    seconds, of_dense = (sum(time.step_parts(run, speed).values()) for run in (one, one.change(attention=one.base.name)))
    numbers = (memory.total(one) / 2**30, seconds, of_dense / seconds)
    return again(one), f"{one.seq_length:,}", f"{most.seq_length:,}", *(f"{x:.1f}" for x in numbers)


def layouts(run: Run, held: search.Held = search.NOTHING) -> Iterator[Run]:
    """Those in which all GPUs share one sequence, with the parts that are held."""
    for one in search.layouts(run.change(global_batch=1, seq_length=MOST), held):
        if one.data_parallel == 1:
            yield one
