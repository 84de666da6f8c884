"""Both implementations of the steps, and inputs for them: what the tests of each step are parametrised over."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_lighthouse import LighthouseConfig
from megatron_lighthouse.kernels import lighthouse as kernels
from megatron_lighthouse.lighthouse import reference
from megatron_lighthouse.lighthouse.layer import build
from megatron_lighthouse.lighthouse.selection import Selection
from megatron_lighthouse.lighthouse.steps import Steps
from tests.oracle import Entry, Problem, number, order, problems, select

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUTS = ["contiguous", "slices of one fused projection", "batch and heads first"]

both = pytest.mark.parametrize("steps", [reference, kernels], ids=["reference", "kernels"])
rounded = pytest.param("bfloat16", marks=pytest.mark.gpu)
"""bf16 in kernels: Triton's interpreter cuts off where a GPU rounds."""
small_problems = problems().filter(lambda p: p.seq_length * p.batch * p.groups * p.queries_per_group <= 500)
"""Without the few largest, which take most of the time under Triton's interpreter."""
both_in_halves = pytest.mark.parametrize(
    ("steps", "kind"),
    [
        pytest.param(steps, kind, marks=[pytest.mark.gpu] * (steps is kernels and kind == "bfloat16"), id=f"{name}-{kind}")
        for steps, name in ((reference, "reference"), (kernels, "kernels"))
        for kind in ("float16", "bfloat16")
    ],
)


def precision(steps: Steps) -> str:
    """The widest floating dtype that the steps take; also the tolerance to hold them to."""
    return "float32" if steps is kernels else "float64"


def tensors(problem: Problem, dtype: str = "float64") -> list[Tensor]:
    """q [N, B, H, D], k and v [N, B, G, D], on the device under test."""
    return [torch.from_numpy(x).to(DEVICE, getattr(torch, dtype)) for x in problem.arrays()]


def restride(layout: str, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """The same numbers as Megatron may hand them over."""
    if layout == "slices of one fused projection":
        ratio = query.shape[2] // key.shape[2]
        fused = torch.cat([query.unflatten(2, (-1, ratio)), key.unsqueeze(3), value.unsqueeze(3)], 3)
        return [fused[:, :, :, :ratio].flatten(2, 3), fused[:, :, :, ratio], fused[:, :, :, ratio + 1]]
    if layout == "batch and heads first":
        return [x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3) for x in (query, key, value)]
    return [query, key, value]


def entries(problem: Problem, seed: int = 0) -> list[list[list[Entry]]]:
    """Entries of each batch element and group in causal order, chosen by random scores with many ties."""
    generator = torch.Generator().manual_seed(seed)

    def scores() -> list[float]:
        return torch.randint(0, 4, (problem.seq_length,), generator=generator).tolist()

    return [[order(select(scores(), scores(), problem), problem) for _ in range(problem.groups)] for _ in range(problem.batch)]


def selection_of(problem: Problem, chosen: list[list[list[Entry]]]) -> Selection:
    """The inverse map of `entries`, filled in one by one."""
    geometry = LighthouseConfig(**problem.options).geometry(problem.seq_length)
    places = torch.full((problem.batch, problem.groups, geometry.pyramid_length), -1, dtype=torch.int32)
    for b, groups in enumerate(chosen):
        for g, row in enumerate(groups):
            for place, entry in enumerate(row):
                places[b, g, number(entry, problem)] = place
    return Selection(geometry, places.to(DEVICE), geometry.gathered_length)


def chosen(query: Tensor, key: Tensor, config: LighthouseConfig) -> Selection:
    """The selection that `lighthouse_attention` makes on one rank, by the norms."""
    selection, _ = build(config, query, key).select(query, key, key)
    return selection


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, or the most negative integer, in the kernels' wrappers: what is not written shows."""
    empty = torch.empty

    def filled(*args: Any, **kwargs: Any) -> Tensor:
        x = empty(*args, **kwargs)
        x.detach().fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).min)
        return x

    with mock.patch.object(torch, "empty", filled):
        yield


def differentiate(function: Callable[..., Any], inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of `inputs`, for those of the outputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return list(torch.autograd.grad(outputs, leaves, grads))


def random_like(xs: Sequence[Tensor], seed: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in xs]


def inner_product(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """Over all elements of all pairs, in float64."""
    return torch.stack([(x.double() * y.double()).sum() for x, y in zip(xs, ys, strict=True)]).sum()
