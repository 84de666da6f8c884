"""Offsets: the kernels on tensors of more elements than 32 bits count, along each dimension over which they step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_lighthouse.kernels import lighthouse as kernels
from megatron_lighthouse.lighthouse import reference
from megatron_lighthouse.lighthouse.steps import Steps
from tests.oracle import Problem
from tests.steps import DEVICE, entries, random_like, selection_of, tensors
from tests.test_score import geometry_of
from tests.tolerances import assert_close

empty = torch.empty
NEEDED = 40 * 2**30
"""Bytes."""


def far(dim: int, xs: Sequence[Tensor]) -> list[Tensor]:
    """The same numbers, those of the last of `dim` 2^31 elements from the first, or more. What lies between is never touched:
    4 GiB of addresses, and next to no memory."""
    moved = [x.movedim(dim, 0).contiguous() for x in xs]
    last, begin, apart = len(moved[0]) - 1, 0, []
    storage = empty(2**31 + last + sum(x[0].numel() for x in moved), dtype=xs[0].dtype, device=DEVICE)
    for x in moved:
        apart.append(storage[begin:].as_strided(x.shape, (-(-(2**31) // last), *x.stride()[1:])).copy_(x).movedim(0, dim))
        begin += x[0].numel()
    return apart


@contextmanager
def far_results(dim: int) -> Iterator[None]:
    """Rows and tokens that the kernels' wrappers make are such tensors too."""

    def made(shape: Sequence[int], **kwargs: Any) -> Tensor:
        return far(dim, [torch.zeros(shape, **kwargs)])[0] if len(shape) == 4 else empty(shape, **kwargs)

    with mock.patch.object(torch, "empty", made):
        yield


def scored(steps: Steps, problem: Problem, inputs: Sequence[Tensor]) -> list[Tensor]:
    query, key, value = inputs
    return [steps.score(query, key, geometry_of(problem)), steps.attended_norms(query, key, value, None)]


def carried(
    steps: Steps, problem: Problem, inputs: Sequence[Tensor], rows: Sequence[Tensor], grads: Sequence[Tensor]
) -> list[Tensor]:
    """What is gathered and what is scattered, and the gradients of both, by `rows` and by `grads`."""
    selection = selection_of(problem, entries(problem))
    query, key, value = inputs = [x.detach().requires_grad_() for x in inputs]
    attended = rows[0].detach().requires_grad_()
    gathered, scattered = steps.gather(query, key, value, selection), steps.scatter(attended, selection)
    back = *torch.autograd.grad(gathered, inputs, rows), *torch.autograd.grad(scattered, attended, grads)
    return [*gathered, scattered, *back]


@pytest.mark.parametrize(("dim", "batch", "groups"), [(0, 1, 1), (1, 3, 1), (2, 1, 3)], ids=["tokens", "batch", "heads"])
def test_tensors_that_32_bits_do_not_span(dim: int, batch: int, groups: int) -> None:
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < NEEDED:
        pytest.skip("a GPU has what is allocated, touched or not: 40 GiB")
    problem = Problem(24, 3, 2, 2, 2, batch=batch, groups=groups, dim=4)
    inputs = tensors(problem, "float16")
    rows = reference.gather(*inputs, selection_of(problem, entries(problem)))
    near = inputs, rows, random_like(inputs[:1])
    expected = [*scored(reference, problem, inputs), *carried(reference, problem, *near)]
    inputs, *others = (far(dim, xs) for xs in near)
    actual = scored(kernels, problem, inputs)
    with far_results(dim):
        actual += carried(kernels, problem, inputs, *others)
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, "float16")
