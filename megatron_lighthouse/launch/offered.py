"""What `check` offers where a run's ranks and its GPUs do not go together: sizes that no other rule refuses.

Imports no Megatron.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Iterator

from megatron_lighthouse.launch.sizes import sizes as refused
from megatron_lighthouse.usage import as_flag

SIZES = ("context_parallel_size", "pipeline_model_parallel_size", "tensor_model_parallel_size")
"""In the order in which they are offered."""
type Problems = Callable[[argparse.Namespace], Iterable[str]]


def sizes(args: argparse.Namespace, world: int, alone: bool = False) -> Iterator[tuple[str, list[int]]]:
    """Arguments of which another value alone has all of `world` GPUs work: the next below and above that do.

    Args:
        alone: by the layout alone, whatever else is refused.
    """
    works = _shares if alone else _works
    for name in SIZES:
        given = getattr(args, name)
        fits = [n for n in range(1, world + 1) if world % n == 0 and works(args, world, **{name: n})]
        if near := [*[n for n in fits if n < given][-1:], *[n for n in fits if n > given][:1]]:
            yield name, near


def in_words(offers: Iterable[tuple[str, list[int]]]) -> list[str]:
    """The same as flags with values."""
    return [f"{as_flag(name)} {' or '.join(map(str, near))}" for name, near in offers]


def left(found: list[str], args: argparse.Namespace, world: int, problems: Problems) -> list[str]:
    """Of what is found, the first, and what the sizes that it offers would leave, with what works then: the rest would send
    elsewhere."""
    offers = [*sizes(args, world), *sizes(args, world, alone=True)] if world % one_sequence(args) else []
    offer = next((one for one in offers if in_words([one])[0] in found[0]), None)
    if offer is None:
        return found
    there = {_rule(problem) for problem in found[1:]}
    still = problems(argparse.Namespace(**vars(args) | {offer[0]: offer[1][0]}))
    return [found[0], *(problem for problem in still if _rule(problem) in there)]


def _rule(problem: str) -> str:
    """What a problem says before what works."""
    return problem.partition(": use ")[0]


def gpus(args: argparse.Namespace, nodes: int, gpus_per_node: int, asked_by: str) -> Iterator[str]:
    """Other numbers of nodes, or of GPUs of one machine, where only these do not fit: no more than given if some do."""
    one_machine = asked_by != "--nodes"
    unit, given = (1, nodes * gpus_per_node) if one_machine else (gpus_per_node, nodes)
    one = one_sequence(args)
    counts = [n for n in range(1, 4 * max(one, given) + 1) if n * unit % one == 0]
    if one_machine and counts[0] <= given:
        counts = [n for n in counts if n <= given]
    fits = sorted((n for n in counts if _works(args, n * unit)), key=lambda n: abs(n - given))
    if fits:
        yield f"{asked_by} {' or '.join(map(str, sorted(fits[:2])))}"


def one_sequence(args: argparse.Namespace) -> int:
    """GPUs that hold one copy of the model and one sequence."""
    return math.prod(getattr(args, name) for name in SIZES)


def _works(args: argparse.Namespace, world: int, **changes: int) -> bool:
    """Whether nothing that depends on the sizes is refused with these."""
    tried = argparse.Namespace(**{**vars(args), **changes, "world_size": world})
    return _shares(tried, world) and not any(as_flag(name) in problem for problem in refused(tried) for name in SIZES)


def _shares(args: argparse.Namespace, world: int, **changes: int) -> bool:
    """Whether the layout is right with these."""
    from megatron_lighthouse.launch.layout import layout  # which offers what is found here

    tried = argparse.Namespace(**{**vars(args), **changes, "world_size": world})
    return world % one_sequence(tried) == 0 and not any(layout(tried, 1, world))
