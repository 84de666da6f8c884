"""`plan --longest`: the longest context of a model on given GPUs, by what is computed again in backward, and its flags."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from megatron_lighthouse.lighthouse.config import LighthouseConfig
from megatron_lighthouse.plan import memory, search, time
from megatron_lighthouse.plan.coefficients import Coefficients
from megatron_lighthouse.plan.report import again, extrapolated, kind, layout, table
from megatron_lighthouse.plan.run import Run
from megatron_lighthouse.plan.words import layout_words

MOST = 2**24
UNITS = ((2**17, 2**13), (2**19, 2**14), (MOST, 2**16))
"""Up to so many tokens, lengths are multiples of this: each has the budget of its length in tiles of 32 to 128."""


def answer(name: str, run: Run, layouts: Iterable[Run], own: bool, speed: Coefficients) -> str:
    """In a few lines, and a row for each way of computing again.

    Args:
        run: of the model, with the GPUs.
        layouts: of these GPUs, at any length; one sequence a step.
        own: whether the levels and the budget of `run` stay as they are: else each length has its own.

    Raises:
        ValueError: no length fits.
    """

    def reach(one: Run) -> tuple[int, float]:
        return one.seq_length, time.tokens_per_gpu(one, speed)

    best: dict[tuple[str, bool], Run] = {}
    for one in layouts:
        if found := longest(one, own, lambda run: not memory.tight(run)):
            way = found.recompute, bool(found.mlp_tile_tokens)
            best[way] = max(best.get(way, found), found, key=reach)
    if not best:
        raise ValueError(f"--gpus {run.gpus}: no length of this model fits: use more GPUs, or another --device.")
    rows = [_cells(one, own, speed) for _, one in sorted(best.items(), key=lambda item: item[1].seq_length)]
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
            f"flags: {sizes} {layout_words(found)}",
            f"at most: by the count itself; what is recommended leaves the {memory.PROMISED:.0%} that it may be wrong by",
        ]
    )


def _cells(one: Run, own: bool, speed: Coefficients) -> tuple[str, ...]:
    most = longest(one, own, memory.fits) or one
    seconds, of_dense = (sum(time.step_parts(run, speed).values()) for run in (one, one.change(attention=one.base.name)))
    numbers = (memory.total(one) / 2**30, seconds, of_dense / seconds)
    return again(one), f"{one.seq_length:,}", f"{most.seq_length:,}", *(f"{x:.1f}" for x in numbers)


def longest(run: Run, own: bool, fits: Callable[[Run], bool]) -> Run | None:
    """The run at the greatest length that is accepted and fits; None where none does. Memory grows with length."""
    unit = run.context_parallel * run.tensor_parallel
    lengths = [length for length in _lengths() if length % unit == 0]
    low, high, found = 0, len(lengths) - 1, None
    while low <= high:
        middle = (low + high) // 2
        tried = at(run, lengths[middle], own)
        try:
            fit = fits(tried.check())
        except ValueError:  # a budget that this length is too short for, or that it does not divide by
            fit = tried.variant.selects and own and lengths[middle] < _least(run)
        if fit:
            low, found = middle + 1, tried
        else:
            high = middle - 1
    return found if found and _accepted(found) else None


def at(run: Run, length: int, own: bool) -> Run:
    """The run at another length, with the levels and the budget that it asks for unless it has its own."""
    if own:
        return run.change(seq_length=length)
    keep = ("pooling", "scorer", "around")
    config = LighthouseConfig.for_length(length, **{name: getattr(run.config, name) for name in keep})
    return run.change(seq_length=length, config=config)


def _least(run: Run) -> int:
    return run.config.pooling ** (run.config.levels - 1) * run.config.budget


def _accepted(run: Run) -> bool:
    try:
        run.check()
    except ValueError:
        return False
    return True


def _lengths() -> Iterator[int]:
    start = 0
    for most, unit in UNITS:
        yield from range(start + unit, most + 1, unit)
        start = most


def layouts(run: Run) -> Iterator[Run]:
    """Those in which all GPUs share one sequence."""
    for one in search.layouts(run.change(global_batch=1, seq_length=MOST)):
        if one.data_parallel == 1:
            yield one
