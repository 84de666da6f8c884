"""Scatter: each row, added to the positions that its window spills to."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_lighthouse.lighthouse.steps import Steps
from tests.oracle import Problem, scatter
from tests.steps import (
    DEVICE,
    both,
    both_in_halves,
    differentiate,
    entries,
    inner_product,
    poisoned,
    precision,
    random_like,
    selection_of,
    small_problems,
)
from tests.tolerances import assert_close

few = settings(derandomize=True, max_examples=10)
GQA = Problem(96, 3, 2, 8, 4, batch=2, groups=2, queries_per_group=3, seed=1)
heads_first = st.booleans()


def rows_of(problem: Problem, dtype: str, heads_first: bool = False) -> Tensor:
    """Random rows [S, B, H, D]; as an attention over [B, H, S, D] hands them over, where asked."""
    length = len(entries(problem)[0][0])
    heads = problem.groups * problem.queries_per_group
    shape = (problem.batch, heads, length, problem.dim) if heads_first else (length, problem.batch, heads, problem.dim)
    generator = torch.Generator().manual_seed(problem.seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, getattr(torch, dtype))
    return x.permute(2, 0, 1, 3) if heads_first else x


@both
@few
@given(problem=small_problems, heads_first=heads_first)
def test_equals_the_oracle(steps: Steps, problem: Problem, heads_first: bool) -> None:
    rows, chosen = rows_of(problem, precision(steps), heads_first), entries(problem)
    with poisoned():
        out = steps.scatter(rows, selection_of(problem, chosen))
    for b in range(problem.batch):
        for head in range(rows.shape[2]):
            row = rows[:, b, head].double().cpu().numpy()
            expected = scatter(row, chosen[b][head // problem.queries_per_group], problem)
            assert_close(out[:, b, head], expected, precision(steps))


@both
@few
@given(problem=small_problems, heads_first=heads_first)
def test_backward_is_the_adjoint(steps: Steps, problem: Problem, heads_first: bool) -> None:
    """<scatter(x), y> = <x, backward(y)> for the linear map that scatter is, whatever x and y."""
    rows, selection = rows_of(problem, precision(steps), heads_first), selection_of(problem, entries(problem))
    with poisoned():
        out = steps.scatter(rows, selection)
        grads = random_like([out])
        back = differentiate(lambda x: steps.scatter(x, selection), [rows], grads)
    assert_close(inner_product(back, [rows]), inner_product([out], grads), f"adjoint {precision(steps)}")


@both_in_halves
def test_half_precision_sums_are_wide(steps: Steps, kind: str) -> None:
    rows, chosen = rows_of(GQA, kind), entries(GQA)
    out = steps.scatter(rows, selection_of(GQA, chosen))
    for b in range(GQA.batch):
        for head in range(rows.shape[2]):
            exact = scatter(rows[:, b, head].double().cpu().numpy(), chosen[b][head // GQA.queries_per_group], GQA)
            assert torch.equal(out[:, b, head].cpu(), torch.from_numpy(exact).to(out.dtype))


@both
def test_gradients_of_any_strides(steps: Steps) -> None:
    rows, selection = rows_of(GQA, precision(steps)), selection_of(GQA, entries(GQA))
    (grad,) = random_like([steps.scatter(rows, selection)])
    for other in (grad.transpose(0, 3).contiguous().transpose(0, 3), grad[:1, :1, :1, :1].expand_as(grad)):
        actual = differentiate(lambda x: steps.scatter(x, selection), [rows], [other])
        expected = differentiate(lambda x: steps.scatter(x, selection), [rows], [other.contiguous()])
        assert torch.equal(actual[0], expected[0])


@both
def test_backward_keeps_the_map_alone(steps: Steps) -> None:
    rows, selection = rows_of(GQA, precision(steps)), selection_of(GQA, entries(GQA))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        steps.scatter(rows.requires_grad_(), selection)
    assert all(x.data_ptr() == selection.places.data_ptr() for x in kept)
