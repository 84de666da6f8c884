"""Attended norms: how long the rows of causal attention are, to the same bits whichever rank computes them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.lighthouse import reference
from megatron_lighthouse.lighthouse.steps import Steps
from megatron_lighthouse.sequence.layout import Layout
from tests.oracle import Array, Problem, attend, norms
from tests.steps import DEVICE, LAYOUTS, both, both_in_halves, poisoned, precision, restride, tensors
from tests.tolerances import assert_close

ROWS = {
    "more rows than a block": Problem(150, 2, 2, 2, 2, batch=2, groups=2, queries_per_group=2, dim=40),
    "D=256": Problem(40, 2, 2, 2, 2, dim=256, queries_per_group=2),
    "D=1": Problem(33, 2, 2, 2, 2, dim=1),
}


def _rows(q: Array, k: Array, v: Array) -> Array:
    return attend(q, k, v, 1 / math.sqrt(q.shape[1]))


@both
@pytest.mark.parametrize("shape", ROWS)
def test_attended_norms_equal_the_oracle(shape: str, steps: Steps) -> None:
    case = ROWS[shape]
    q, k, v = inputs = tensors(case, precision(steps))
    expected = np.zeros((case.batch, case.groups, case.seq_length))
    for b in range(case.batch):
        for g in range(case.groups):
            heads = range(g * case.queries_per_group, (g + 1) * case.queries_per_group)
            rows = [_rows(*(x.double().cpu().numpy() for x in (q[:, b, h], k[:, b, g], v[:, b, g]))) for h in heads]
            expected[b, g] = norms(np.stack(rows, 1))
    with poisoned():
        assert_close(steps.attended_norms(*inputs, None), expected, precision(steps))


@both_in_halves
@pytest.mark.parametrize("layout", LAYOUTS)
def test_attended_norms_of_half_precision(layout: str, steps: Steps, kind: str) -> None:
    inputs = restride(layout, *tensors(ROWS["more rows than a block"], kind))
    actual = steps.attended_norms(*inputs, None)
    assert actual.dtype == torch.float32
    assert_close(actual, reference.attended_norms(*(x.double() for x in inputs), None), kind)


@both
def test_rows_longer_than_the_dtype_holds_do_not_overflow(steps: Steps) -> None:
    x = torch.full((8, 1, 1, 64), 60000, dtype=torch.float16, device=DEVICE)
    assert_close(steps.attended_norms(x / 60000, x / 60000, x, None), torch.full((1, 1, 8), 480000), "float32")


@both
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("length", [128, 272])
def test_a_row_has_the_same_bits_on_any_rank(length: int, size: int, dtype: str, steps: Steps) -> None:
    """Chunks of 272 tokens begin within blocks."""
    query, key, value = tensors(Problem(length, 2, 2, 2, 2, batch=1, queries_per_group=2, dim=16), dtype)
    whole = steps.attended_norms(query, key, value, None)
    for rank in range(size):
        exchange = Exchange(None, Layout(size, rank))
        with poisoned():
            mine = steps.attended_norms(exchange.own(query), key, value, exchange.layout)
        assert torch.equal(mine, exchange.own(whole.movedim(-1, 0)).movedim(0, -1))


def test_the_fake_implementation_is_that_of_the_op() -> None:
    inputs = tensors(ROWS["D=1"], "float32")
    checks = ["test_schema", "test_faketensor"]
    torch.library.opcheck(torch.ops.lighthouse.attended_squares, (*inputs, [0], 0.9), test_utils=checks)


@both
def test_no_gradient(steps: Steps) -> None:
    inputs = [x.requires_grad_() for x in tensors(ROWS["D=1"], "float32")]
    assert not steps.attended_norms(*inputs, None).requires_grad
