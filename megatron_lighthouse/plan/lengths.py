"""The greatest lengths that fit: of a layout with its budget, of a layout with each length's own, and of GPUs."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator

from megatron_lighthouse.lighthouse.by_length import by_length
from megatron_lighthouse.plan import memory, search
from megatron_lighthouse.plan.run import Run
from megatron_lighthouse.plan.stages import FRACTION, Stages

MOST = 2**24
UNITS = ((2**17, 2**13), (2**19, 2**14), (MOST, 2**16))
"""Up to so many tokens, lengths are multiples of this: each has the budget of its length in tiles of 32 to 128."""


def of_layout(run: Run, most: int = 2**27) -> int | None:
    """The greatest sequence length of this layout that is accepted and fits, with the run's budget; None where none is."""
    window, budgets = run.config.pooling ** (run.config.levels - 1), [run.config.budget]
    budgets += [run.edge_budget] if run.edge_budget else []
    tiles = math.lcm(*(budget // run.config.tile_budget for budget in budgets))
    unit = math.lcm(window * tiles, 2 * run.context_parallel * window * run.tensor_parallel, 1024)
    low, high = 0, most // unit
    while low < high:  # memory grows with length
        middle = (low + high + 1) // 2
        short = run.variant.selects and middle * unit < window * max(budgets)  # too short for the budget
        low, high = (middle, high) if short or _works(run.change(seq_length=middle * unit)) else (low, middle - 1)
    return low * unit if low and _works(run.change(seq_length=low * unit)) else None


EIGHTHS = 8
"""Lengths between two powers of two that are tried."""


def of_gpus(run: Run, fraction: float = FRACTION, most: int = 2**27) -> Run | None:
    """The longest context of which both stages fit these GPUs, whatever the layout, by recomputing all layers; None: none.

    Levels and budgets are those of each length. Lengths go by eighths from one power of two to the next.
    """
    powers = [2**n for n in range(12, most.bit_length())]
    low, high = 0, len(powers)
    while low < high:  # memory grows with length
        middle = (low + high) // 2
        low, high = (middle + 1, high) if _held(run, powers[middle], fraction) else (low, middle)
    # powers are not shared by an odd number of ranks: other lengths may be, and be as many times as long
    least, octaves = powers[max(0, low - 1)], _odd(run.gpus).bit_length()
    lengths = [least * 2**n * (EIGHTHS + part) // EIGHTHS for n in range(octaves) for part in range(EIGHTHS)]
    return next(filter(None, (_held(run, length, fraction) for length in reversed(lengths) if length <= most)), None)


def _odd(number: int) -> int:
    """What is left of it, halved while that can be."""
    return number // (number & -number)


def _held(run: Run, length: int, fraction: float) -> Run | None:
    """A layout with a sequence for each data-parallel rank, where it fits; of as few of these as may be."""
    run = at(run, length)
    held = {"recompute": "full", "cp_comm_type": search.SCHEMES[0]}
    layouts = [one for one in search.layouts(run, held) if _odd(run.gpus) % one.data_parallel == 0]
    for layout in sorted(layouts, key=lambda one: one.data_parallel):
        stages = Stages(layout.change(global_batch=layout.data_parallel), fraction)
        if all(map(_works, stages.runs)):
            return stages.run
    return None


def _works(run: Run) -> bool:
    """Whether the run is accepted and fits."""
    try:
        return memory.fits(run.check())
    except ValueError:
        return False


def of_run(run: Run, given: Collection[str], fits: Callable[[Run], bool]) -> Run | None:
    """The run at the greatest length that is accepted and fits; None where none does. Memory grows with length.

    Args:
        given: as `at` takes them.
    """
    unit = run.context_parallel * run.tensor_parallel
    lengths = [length for length in _lengths() if length % unit == 0]
    low, high, found = 0, len(lengths) - 1, None
    while low <= high:
        middle = (low + high) // 2
        tried = at(run, lengths[middle], given)
        try:
            fit = fits(tried.check())
        except ValueError:  # a budget that this length is too short for, or that it does not divide by
            fit = tried.variant.selects and bool(given) and lengths[middle] < _least(tried)
        if fit:
            low, found = middle + 1, tried
        else:
            high = middle - 1
    return found if found and _accepted(found) else None


def at(run: Run, length: int, given: Collection[str] = ()) -> Run:
    """The run at another length, with the levels and the budget that this asks for, but for fields that are given."""
    kept = {name: getattr(run.config, name) for name in given}
    return run.change(seq_length=length, config=run.config.replace(**by_length(length, run.config.pooling, **kept)))


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
