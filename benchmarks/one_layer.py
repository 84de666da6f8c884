"""What the benchmarks of one layer of Parallax and of Wall share: sizes, and Lighthouse around it, timed and repeated alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from measure import median_ms, peak_gib
from torch import Tensor

from megatron_lighthouse import LighthouseConfig

COPIES = 2
"""Sets of inputs, taken in turn."""
AROUND_FROM = 98304
"""Tokens from which Lighthouse is timed too."""
Layer = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of queries, keys, values and the stream, in its own order."""


class Case(NamedTuple):
    """Sizes of a layer."""

    tokens: int
    heads: int
    groups: int
    dim: int


CASES = [Case(32768, 8, 8, 128), Case(98304, 8, 8, 128), Case(32768, 8, 8, 64), Case(32768, 32, 8, 128)]


def of_length(tokens: int) -> Case:
    """8 heads of 128, as the first of CASES."""
    return CASES[0]._replace(tokens=tokens)


def around(name: str) -> LighthouseConfig:
    """Lighthouse with the budget of 98,304 tokens, around this attention."""
    return LighthouseConfig(levels=3, pooling=4, budget=1536, tile_budget=128, around=name)


WITHOUT_STREAM = ("dense", "lighthouse")
"""Layers that read queries, keys and values alone."""


class Timed(NamedTuple):
    """One layer."""

    first_s: float
    """Of the first call, which compiles."""
    ms: dict[str, float]
    """By direction."""
    peak_gib: float


def timed(name: str, layer: Layer, sets: list[list[Tensor]]) -> Timed:
    """A layer over sets of inputs with gradients, forward and forward with backward."""
    grad = torch.randn_like(sets[0][0])

    def both(inputs: list[Tensor]) -> object:
        return torch.autograd.grad(layer(*inputs), inputs, grad, allow_unused=name in WITHOUT_STREAM)

    begin = time.perf_counter()
    both(sets[0])
    torch.cuda.synchronize()
    first = time.perf_counter() - begin
    ms = {
        "fwd": median_ms([partial(layer, *(x.detach() for x in inputs)) for inputs in sets]),
        "fwd+bwd": median_ms([partial(both, inputs) for inputs in sets]),
    }
    return Timed(first, ms, peak_gib(partial(both, sets[0])))


def repeats(layer: Layer, inputs: list[Tensor], times: int) -> bool:
    """Whether so many more runs, forward and backward, give the same bits."""
    grad = torch.randn_like(inputs[0])

    def once() -> list[Tensor]:
        out = layer(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    first = once()
    return all(all(map(torch.equal, once(), first)) for _ in range(times))
