"""lighthouse_attention against the loops of oracle.py, and the properties it promises."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_lighthouse import LighthouseConfig, lighthouse_attention, lighthouse_select
from megatron_lighthouse.lighthouse.attention import attended_rows
from megatron_lighthouse.lighthouse.reference import gather, scatter
from megatron_lighthouse.lighthouse.rotary import Rotary
from megatron_lighthouse.lighthouse.selection import Selection
from tests.oracle import Problem, attention, problems
from tests.steps import LAYOUTS, chosen, restride, tensors
from tests.tolerances import assert_close

thorough = settings(derandomize=True, max_examples=100)
GQA = Problem(96, 3, 2, 8, 4, batch=2, groups=2, queries_per_group=3, seed=1)


def config_of(problem: Problem) -> LighthouseConfig:
    return LighthouseConfig(**problem.options)


def forward_backward(inputs: list[Tensor], config: LighthouseConfig, fixed: Selection | None = None) -> list[Tensor]:
    """Output and the three gradients, for a fixed random gradient of the output."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = lighthouse_attention(*leaves, config, selection=fixed)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@thorough
@given(
    problems(),
    st.sampled_from(LAYOUTS),
    st.sampled_from([None, 0.3]),
)
def test_equals_the_oracle(problem: Problem, layout: str, scale: float | None) -> None:
    inputs = restride(layout, *tensors(problem))
    out = lighthouse_attention(*inputs, config_of(problem), softmax_scale=scale)
    assert out.dtype == torch.float64
    indices, expected = attention(*problem.arrays(), problem, scale)
    np.testing.assert_array_equal(chosen(*inputs[:2], config_of(problem)).indices.numpy(), indices)
    assert_close(out, expected, "float64")


@pytest.mark.parametrize("rotary", [None, Rotary(torch.tensor([0.8]), interleaved=True)], ids=["mean", "last"])
@pytest.mark.parametrize(
    ("levels", "pooling", "length", "ratio"),
    [(2, 3, 18, 3), (3, 2, 24, 1), *(pytest.param(*x, marks=pytest.mark.slow) for x in ((2, 3, 18, 1), (3, 2, 24, 3)))],
)
def test_gradients_are_those_of_finite_differences(
    rotary: Rotary | None, levels: int, pooling: int, length: int, ratio: int
) -> None:
    problem = Problem(length, levels, pooling, 4, 2, groups=2 if ratio == 1 else 1, queries_per_group=ratio, dim=2)
    inputs = [x.requires_grad_() for x in tensors(problem)]
    config = config_of(problem)
    selection = chosen(*inputs[:2], config)  # held fixed: a step of the differences must not move a choice
    assert torch.autograd.gradcheck(lambda *qkv: lighthouse_attention(*qkv, config, rotary=rotary, selection=selection), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bit_identical_from_run_to_run(dtype: torch.dtype) -> None:
    inputs = [x.to(dtype) for x in tensors(replace(GQA, ties=True))]
    first = forward_backward(inputs, config_of(GQA))
    for _ in range(3):
        assert all(map(torch.equal, first, forward_backward(inputs, config_of(GQA))))


def test_with_one_query_head_a_group_each_head_is_its_own_layer() -> None:
    problem = replace(GQA, groups=3, queries_per_group=1)
    inputs = tensors(problem)
    together = lighthouse_attention(*inputs, config_of(problem))
    for h in range(3):
        alone = lighthouse_attention(*[x[:, :, h : h + 1] for x in inputs], config_of(problem))
        assert_close(together[:, :, h : h + 1], alone, "float64")


def test_grouped_queries_equal_repeated_keys_and_values() -> None:
    query, key, value = tensors(GQA)
    ratio, config = GQA.queries_per_group, config_of(GQA)
    grouped = chosen(query, key, config)
    each = Selection(grouped.geometry, grouped.places.repeat_interleave(ratio, 1), grouped.length)
    actual = forward_backward([query, key, value], config)
    expected = forward_backward([query, *(x.repeat_interleave(ratio, 2) for x in (key, value))], config, each)
    expected[2:] = [x.unflatten(2, (-1, ratio)).sum(3) for x in expected[2:]]
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, "float64")


def test_each_batch_element_equals_running_it_alone() -> None:
    inputs = tensors(GQA)
    together = lighthouse_attention(*inputs, config_of(GQA))
    for b in range(GQA.batch):
        alone = lighthouse_attention(*[x[:, b : b + 1] for x in inputs], config_of(GQA))
        assert_close(together[:, b : b + 1], alone, "float64")


@thorough
@given(problems(), st.data())
def test_later_tokens_never_change_earlier_outputs(problem: Problem, data: st.DataObject) -> None:
    start = data.draw(st.integers(1, problem.seq_length - 1), label="first changed token")
    config, inputs = config_of(problem), tensors(problem)
    selection = chosen(*inputs[:2], config)
    before = lighthouse_attention(*inputs, config, selection=selection)
    for x, other in zip(inputs, tensors(replace(problem, seed=problem.seed + 1, ties=False)), strict=True):
        x[start:] = 10 * other[start:]
    after = lighthouse_attention(*inputs, config, selection=selection)
    assert torch.equal(before[:start], after[:start])
    assert not torch.equal(before[-1], after[-1])  # the change was seen: the last position attends to every token


@thorough
@given(problems(ties=False))
def test_pinning_the_first_window_leaves_no_position_empty(problem: Problem) -> None:
    query, key, value = tensors(problem)
    for x in (query, key):
        x[: problem.window] *= 1e-3  # by its norms the first window would lose at every level
    for pin_first in (True, False):
        out = lighthouse_attention(query, key, value, config_of(replace(problem, pin_first=pin_first)))
        empty = (out == 0).all(-1).all(-1).all(-1).nonzero().flatten().tolist()
        if pin_first:
            assert empty == []
        elif problem.budget * problem.window < problem.seq_length:  # else there is room for the first window too
            assert empty == list(range(problem.window - 1))


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_every_precision_is_near_float64(kind: str) -> None:
    dtype = getattr(torch, kind)
    inputs = [x.to(dtype) for x in tensors(GQA)]
    selection = chosen(*inputs[:2], config_of(GQA))
    actual = forward_backward(inputs, config_of(GQA), selection)
    expected = forward_backward([x.double() for x in inputs], config_of(GQA), selection)
    for a, b, like in zip(actual, expected, [inputs[0], *inputs], strict=True):
        assert a.dtype == dtype
        assert a.shape == like.shape
        assert_close(a, b, kind)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_backward_when_only_some_inputs_require_grad(wanted: tuple[int, ...]) -> None:
    expected = forward_backward(tensors(GQA), config_of(GQA))
    inputs = [x.requires_grad_(i in wanted) for i, x in enumerate(tensors(GQA))]
    out = lighthouse_attention(*inputs, config_of(GQA))
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    for i, x in enumerate(inputs):
        if i in wanted:
            assert x.grad is not None
            assert_close(x.grad, expected[1 + i], "float64")
        else:
            assert x.grad is None


def test_the_inner_attention_sees_the_gathered_rows_alone() -> None:
    query, key, value = tensors(GQA)
    selection = chosen(query, key, config_of(GQA))
    seen: list[Tensor] = []

    def attend(*rows: Tensor) -> Tensor:
        seen.extend(rows)
        return rows[0]

    out = lighthouse_attention(query, key, value, config_of(GQA), attend=attend)
    length = selection.length
    assert [x.shape for x in seen] == [(length, 2, heads, 4) for heads in (6, 2, 2)]
    for actual, expected in zip(seen, gather(query, key, value, selection), strict=True):
        assert_close(actual, expected, "float64")
    assert_close(out, scatter(seen[0], selection), "float64")


QKV = (32, 1, 2, 2)


@pytest.mark.parametrize(
    ("query", "key", "value", "rule"),
    [
        pytest.param((32, 2, 2), QKV, QKV, "query [N, B, H, D]", id="3-d query"),
        pytest.param(QKV, (32, 2, 2), (32, 2, 2), "[N, B, G, D]", id="3-d key"),
        pytest.param(QKV, QKV, (32, 1, 1, 2), "of one shape", id="key unlike value"),
        pytest.param(QKV, (64, 1, 2, 2), (64, 1, 2, 2), "agree in N, B and D", id="lengths differ"),
        pytest.param(QKV, (32, 2, 2, 2), (32, 2, 2, 2), "agree in N, B and D", id="batches differ"),
        pytest.param(QKV, (32, 1, 2, 3), (32, 1, 2, 3), "agree in N, B and D", id="head dims differ"),
        pytest.param((32, 1, 3, 2), QKV, QKV, "multiple of the key/value heads", id="3 heads, 2 groups"),
        pytest.param(QKV, (32, 1, 4, 2), (32, 1, 4, 2), "multiple of the key/value heads", id="2 heads, 4 groups"),
        pytest.param((32, 1, 0, 2), QKV, QKV, "neither can be 0", id="no heads"),
        pytest.param((32, 1, 0, 2), (32, 1, 0, 2), (32, 1, 0, 2), "neither can be 0", id="no heads, no groups"),
        pytest.param((30, 1, 2, 2), (30, 1, 2, 2), (30, 1, 2, 2), "query's N 30", id="length does not fit"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], rule: str
) -> None:
    config = LighthouseConfig(levels=2, pooling=2, budget=4, tile_budget=2)
    with pytest.raises(ValueError, match=re.escape(rule)):
        lighthouse_attention(*map(torch.zeros, (query, key, value)), config)


@pytest.mark.parametrize("other", [torch.float64, torch.int64, "meta"], ids=str)
def test_mixed_dtypes_and_devices_are_refused(other: torch.dtype | str) -> None:
    config, x = LighthouseConfig(levels=2, pooling=2, budget=4, tile_budget=2), torch.zeros(QKV)
    for inputs in ((x, x, x.to(other)), (x.to(other), x, x)):
        with pytest.raises(ValueError, match="must share one device and one dtype"):
            lighthouse_attention(*inputs, config)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64], ids=str)
def test_dtypes_that_it_does_not_compute_in_are_refused_with_those_that_work(dtype: torch.dtype) -> None:
    config, x = LighthouseConfig(levels=2, pooling=2, budget=4, tile_budget=2), torch.zeros(QKV)
    with pytest.raises(ValueError, match=rf"float64, float32, bfloat16 or float16, got .*{dtype}"):
        lighthouse_attention(*[x.to(dtype)] * 3, config)
    for works in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert lighthouse_attention(*[x.to(works)] * 3, config).dtype == works


@pytest.mark.parametrize("scheme", ["bogus", "", "a2a+p2p"])
def test_an_unknown_scheme_is_refused_on_one_rank_too(scheme: str) -> None:
    with pytest.raises(ValueError, match=rf"^cp_comm_type {re.escape(scheme)} .*use p2p, all_gather or a2a"):
        lighthouse_attention(*tensors(GQA), config_of(GQA), cp_comm_type=scheme)
    for works in ("p2p", "all_gather", "a2a"):
        lighthouse_attention(*tensors(GQA), config_of(GQA), cp_comm_type=works)


def test_entries_in_place_of_a_selection_are_refused_with_what_to_pass() -> None:
    query, key, value = tensors(GQA)
    entries: Any = lighthouse_select(query, key, config_of(GQA))
    with pytest.raises(
        TypeError, match=r"Selection, not a Tensor: pass `attended_rows\(query, key, value, config\).selection`"
    ):
        lighthouse_attention(query, key, value, config_of(GQA), selection=entries)
    selection = attended_rows(query, key, value, config_of(GQA)).selection
    fixed = lighthouse_attention(query, key, value, config_of(GQA), selection=selection)
    assert torch.equal(fixed, lighthouse_attention(query, key, value, config_of(GQA)))


def test_a_scale_beside_an_inner_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="softmax_scale belongs to"):
        lighthouse_attention(*tensors(GQA), config_of(GQA), softmax_scale=1.0, attend=lambda q, k, v: q)


def test_a_selection_of_another_geometry_is_refused() -> None:
    other = replace(GQA, seq_length=48)
    with pytest.raises(ValueError, match=r"selection was made for .*48.*, not for .*96"):
        lighthouse_attention(*tensors(GQA), config_of(GQA), selection=chosen(*tensors(other)[:2], config_of(other)))


def test_a_selection_of_another_batch_is_refused() -> None:
    query, key, value = tensors(GQA)
    selection = chosen(query[:, :1], key[:, :1], config_of(GQA))
    with pytest.raises(ValueError, match="selection"):
        lighthouse_attention(query, key, value, config_of(GQA), selection=selection)
