"""Mass: who gives how much weight to whom among coarsest windows, and what it hangs on."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lighthouse.kernels import lighthouse as kernels
from megatron_lighthouse.kernels.lighthouse import mass as mass_kernels
from megatron_lighthouse.lighthouse import reference
from megatron_lighthouse.lighthouse.geometry import Geometry, Shape, Tiled
from megatron_lighthouse.lighthouse.scorers import SCORERS, mass_reference
from megatron_lighthouse.lighthouse.steps import Steps
from tests.oracle import Problem, problems
from tests.scorer_oracle import mass_oracle, oracle, pyramid_of
from tests.steps import LAYOUTS, both, both_in_halves, poisoned, precision, restride, small_problems, tensors
from tests.tolerances import assert_close

MASS = SCORERS["mass"]
parts = pytest.mark.parametrize("part", [mass_reference, mass_kernels], ids=["reference", "kernels"])


@settings(derandomize=True, max_examples=15, deadline=None)
@given(problem=problems(), layout=st.sampled_from(LAYOUTS))
def test_equals_the_oracle(problem: Problem, layout: str) -> None:
    query, key, value = tensors(problem)
    expected = oracle("mass", *(x.cpu().numpy() for x in (query, key, value)), problem)
    scores = MASS(*restride(layout, query, key, value), pyramid_of(problem), reference, None)
    assert_close(scores, expected, "float64")


@settings(derandomize=True, max_examples=4, deadline=None)
@given(problem=small_problems, layout=st.sampled_from(LAYOUTS))
def test_kernels_equal_the_reference(problem: Problem, layout: str) -> None:
    inputs = tensors(problem, "float32")
    with poisoned():
        scores = MASS(*restride(layout, *inputs), pyramid_of(problem), kernels, None)
    assert_close(scores, MASS(*(x.double() for x in inputs), pyramid_of(problem), reference, None), "float32")
    assert bool((scores >= 0).all())


@parts
@pytest.mark.parametrize("tile", [150, 70, 8], ids=["one tile", "a shorter last tile", "many in a block"])
def test_rows_and_columns_of_several_blocks(part: ModuleType, tile: int) -> None:
    kind = "float64" if part is mass_reference else "float32"
    query, key, _ = tensors(Problem(150, 2, 2, 2, 2, groups=2, queries_per_group=2, dim=5), kind)
    with poisoned():
        lse, peak = part.rows(query, key, None)
        weights = part.columns(query, key, lse, tile, None)
    for g in range(2):
        q, k = query[:, 0, 2 * g : 2 * g + 2].double().cpu().numpy(), key[:, 0, g].double().cpu().numpy()
        by_query, by_key = mass_oracle(q, k, tile)
        assert_close(peak[0, 2 * g] + peak[0, 2 * g + 1], by_query, kind)
        assert_close(weights[0, g], by_key, kind)


@both_in_halves
def test_half_precision(steps: Steps, kind: str) -> None:
    problem = Problem(192, 3, 2, 16, 8, groups=2, queries_per_group=2, dim=16)
    inputs = tensors(problem, kind)
    scores = MASS(*inputs, pyramid_of(problem), steps, None)
    assert scores.dtype == torch.float32
    assert_close(scores, MASS(*(x.double() for x in inputs), pyramid_of(problem), reference, None), kind)


@both
def test_a_tile_does_not_hang_on_later_ones(steps: Steps) -> None:
    """To the bit, which a sharded selection needs too."""
    problem = Problem(96, 3, 2, 12, 4, groups=2, queries_per_group=2, dim=8)
    query, key, value = tensors(problem, precision(steps))
    other = [torch.cat([x[:64], 3 * x[64:].flip(0)]) for x in (query, key)]
    before, after = (MASS(*x, value, pyramid_of(problem), steps, None) for x in ((query, key), other))
    for level, kept in ((1, 32), (2, 16)):
        one, two = (x.split([48, 24], -1)[level - 1] for x in (before, after))
        assert torch.equal(one[..., :kept], two[..., :kept])
        assert not torch.equal(one[..., kept:], two[..., kept:])


def test_a_window_that_all_look_at_is_found_although_all_are_equally_long() -> None:
    """Where `norm` sees nothing: all queries and keys have norm 1, and one window's keys are what later queries ask for."""
    n, window, wanted = 128, 4, 5
    generator = torch.Generator().manual_seed(2)
    query, key = (torch.nn.functional.normalize(torch.randn(n, 1, 1, 16, generator=generator), dim=-1) for _ in range(2))
    asked = torch.nn.functional.normalize(torch.ones(16), dim=0)
    query[wanted * window + window :] = torch.nn.functional.normalize(query[wanted * window + window :] + 3 * asked, dim=-1)
    key[wanted * window : (wanted + 1) * window] = asked
    scores = MASS(16 * query, key, key, Tiled(n, 3, 2, n // window), reference, None)[1, 0, 0]
    assert scores[-n // window :].argmax() == wanted
    assert scores[: n // 2].argmax() // 2 == wanted


def test_fake_implementations_are_those_of_the_ops() -> None:
    query, key, _ = tensors(Problem(24, 2, 2, 2, 2, groups=2, queries_per_group=2), "float32")
    ops, checks = torch.ops.lighthouse, ["test_schema", "test_faketensor"]
    lse, _ = ops.mass_rows(query, key, [0], 0.9)
    for op, args in (
        (ops.mass_rows, (query, key, [0], 0.9)),
        (ops.mass_columns, (query, key, lse, 12, [0, 0, 24], 0.9)),
        (ops.mass_finer, (query, key, query[:6], key[:1], [24, 3, 2], [0, 0, 24, 24])),
    ):
        torch.library.opcheck(op, args, test_utils=checks)


def test_what_it_costs_is_counted() -> None:
    """Two products of pooled rows: of all earlier windows, and of those of the tile; twice the tokens, four times as much."""
    shape, geometry = Shape(1, 32, 8, 128, 2), Geometry(98304, 3, 4, 1536, 128)
    windows, tile = 98304 // 16, 98304 // 16 // 12
    pairs = windows**2 / 2 + windows * tile / 2
    assert math.isclose(MASS.flops(geometry, shape), 2 * pairs * 32 * 128)
    assert MASS.moved(geometry, shape) > SCORERS["norm"].moved(geometry, shape)
