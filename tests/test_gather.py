"""Gather: the selected rows of the pyramids, pooled on the way."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_lighthouse.lighthouse.steps import Steps
from tests.oracle import Problem, pool
from tests.steps import (
    DEVICE,
    LAYOUTS,
    both,
    both_in_halves,
    differentiate,
    entries,
    inner_product,
    poisoned,
    precision,
    random_like,
    restride,
    selection_of,
    small_problems,
    tensors,
)
from tests.tolerances import assert_close

few = settings(derandomize=True, max_examples=10)
GQA = Problem(96, 3, 2, 8, 4, batch=2, groups=2, queries_per_group=3, seed=1)


@both
@few
@given(problem=small_problems, layout=st.sampled_from(LAYOUTS))
def test_rows_are_the_means_of_windows(steps: Steps, problem: Problem, layout: str) -> None:
    inputs = restride(layout, *tensors(problem, precision(steps)))
    chosen = entries(problem)
    with poisoned():
        rows = steps.gather(*inputs, selection_of(problem, chosen))
    for x, gathered in zip(inputs, rows, strict=True):
        ratio = x.shape[2] // problem.groups
        for b in range(problem.batch):
            for head in range(x.shape[2]):
                expected = pool(x[:, b, head].double().cpu().numpy(), chosen[b][head // ratio], problem)
                assert_close(gathered[:, b, head], expected, precision(steps))


@both
@pytest.mark.parametrize("channels", [8, 4])
def test_without_heads_of_values_there_are_two_sorts_of_rows(steps: Steps, channels: int) -> None:
    """To the bit those that values in the keys' place have where all three are gathered; of any channels."""
    selection, (query, key, value) = selection_of(GQA, entries(GQA)), tensors(GQA, precision(steps))
    value = value[..., :channels]
    with poisoned():
        rows_q, _, rows_v = steps.gather(query, key, value, selection)
        found = steps.gather(query, value, value[:, :, :0], selection)
        assert [x.shape[2] for x in found] == [6, 2, 0]
        assert torch.equal(found[0], rows_q)
        assert torch.equal(found[1], rows_v)
        grads = random_like([rows_q, rows_v])
        expected = differentiate(lambda *x: steps.gather(x[0], key, x[1], selection)[::2], [query, value], grads)
        back = differentiate(lambda *x: steps.gather(*x, value[:, :, :0], selection)[:2], [query, value], grads)
    assert all(map(torch.equal, back, expected))


@both
@few
@given(problem=small_problems, layout=st.sampled_from(LAYOUTS))
def test_backward_is_the_adjoint(steps: Steps, problem: Problem, layout: str) -> None:
    """<gather(x), y> = <x, backward(y)> for the linear map that gather is, whatever x and y."""
    selection = selection_of(problem, entries(problem))
    inputs = restride(layout, *tensors(problem, precision(steps)))
    with poisoned():
        rows = steps.gather(*inputs, selection)
        grads = random_like(rows)
        back = differentiate(lambda *x: steps.gather(*x, selection), inputs, grads)
    for i in range(3):  # Q, K and V apart
        assert_close(inner_product([back[i]], [inputs[i]]), inner_product([rows[i]], [grads[i]]), f"adjoint {precision(steps)}")


@both_in_halves
def test_half_precision_sums_are_wide(steps: Steps, kind: str) -> None:
    # a few halves sum without error in fp32, and windows of 2 and 4 divide exactly: one rounding, at the end
    selection, inputs = selection_of(GQA, entries(GQA)), tensors(GQA, kind)
    with poisoned():
        rows = steps.gather(*inputs, selection)
        back = differentiate(lambda *x: steps.gather(*x, selection), inputs, rows)
    for x, dx, gathered in zip(inputs, back, rows, strict=True):
        wide = _one(x.double(), selection.rows)
        assert torch.equal(gathered, wide.to(gathered.dtype))
        leaf = x.double().requires_grad_()
        (expected,) = torch.autograd.grad(_one(leaf, selection.rows), leaf, gathered.double())
        assert torch.equal(dx, expected.to(dx.dtype))


def _one(x: Tensor, rows: tuple[Tensor, ...]) -> Tensor:
    """The gathered rows of one tensor in float64, written out with torch's own differentiable parts."""
    batch, groups = rows[0].shape[:2]
    ratio, length = x.shape[2] // groups, 1 + max(int(places.max()) for places in rows)
    out = x.new_zeros(length, *x.shape[1:])
    for level, places in enumerate(rows):
        pooled = x.unflatten(0, (places.shape[-1], GQA.pooling**level)).mean(1)
        for b in range(batch):
            for head in range(x.shape[2]):
                taken = (places[b, head // ratio] >= 0).nonzero().flatten()
                out[:, b, head] = out[:, b, head].index_add(0, places[b, head // ratio][taken].long(), pooled[taken, b, head])
    return out


@both
def test_pooling_does_not_overflow(steps: Steps) -> None:
    x = torch.full((96, 2, 2, 4), 60000, dtype=torch.float16, device=DEVICE)
    assert all((rows == 60000).all() for rows in steps.gather(x, x, x, selection_of(GQA, entries(GQA))))


@both
def test_gradients_of_any_strides(steps: Steps) -> None:
    selection, inputs = selection_of(GQA, entries(GQA)), tensors(GQA, precision(steps))
    rows = steps.gather(*inputs, selection)
    contiguous = random_like(rows)
    for grads in (
        [x.transpose(0, 3).contiguous().transpose(0, 3) for x in contiguous],
        [x[:1, :1, :1, :1].expand_as(x) for x in contiguous],
    ):
        actual = differentiate(lambda *x: steps.gather(*x, selection), inputs, grads)
        expected = differentiate(lambda *x: steps.gather(*x, selection), inputs, [x.contiguous() for x in grads])
        assert all(map(torch.equal, actual, expected))


@both
def test_backward_keeps_the_map_alone(steps: Steps) -> None:
    selection = selection_of(GQA, entries(GQA))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        steps.gather(*(x.requires_grad_() for x in tensors(GQA, precision(steps))), selection)
    assert all(x is selection.places or x.data_ptr() == selection.places.data_ptr() for x in kept)
