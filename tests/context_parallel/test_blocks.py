"""Attention of some queries to some keys, and what is merged from it: against autograd in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_lighthouse.context_parallel.merge import merge as merge_torch
from megatron_lighthouse.context_parallel.parts import Mask, Part
from megatron_lighthouse.kernels.merge import merge as merge_kernel
from megatron_lighthouse.softmax.blocks import Plain
from tests.steps import DEVICE
from tests.tolerances import assert_close

SCALE = 0.4
CAUSAL, ALL = Mask((0,), (0,)), Mask((1,), (0,))
merges = pytest.mark.parametrize(
    ("merge", "kind"),
    [(merge_torch, "float64"), (merge_torch, "float32"), (merge_kernel, "float32")],
    ids=["torch fp64", "torch fp32", "kernel"],
)
parts = pytest.mark.parametrize("elements", [1 << 26, 1], ids=["in one part", "row by row"])
by_heads = pytest.mark.parametrize(("heads", "groups"), [(3, 3), (6, 2)], ids=["MHA", "GQA"])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(n: int, m: int, heads: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """[n, B, H, D] and twice [m, B, G, D], no two dimensions alike."""
    return randn(n, 2, heads, 5, seed=1), randn(m, 2, groups, 5, seed=2), randn(m, 2, groups, 5, seed=3)


def attention(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Output [n, B, H, D] and log-sum-exp [B, H, n], by the formula: query i sees keys 0..i where `causal`."""
    ratio = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(ratio, 2) for x in (key, value))
    logits = torch.einsum("nbhd,mbhd->bhnm", query, key) * SCALE
    if causal:
        logits = logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -torch.inf)
    return torch.einsum("bhnm,mbhd->nbhd", logits.softmax(-1), value), logits.logsumexp(-1)


@parts
@by_heads
@pytest.mark.parametrize(("n", "m", "causal"), [(7, 7, True), (7, 7, False), (4, 9, False), (9, 4, False)], ids=str)
def test_plain_equals_autograd(
    n: int, m: int, causal: bool, heads: int, groups: int, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Plain, "ELEMENTS", elements)
    query, key, value = (x.requires_grad_() for x in inputs(n, m, heads, groups))
    out, lse = attention(query, key, value, causal)
    grad = randn(*out.shape, seed=4)
    expected = torch.autograd.grad(out, (query, key, value), grad)
    query, key, value = (x.detach() for x in (query, key, value))
    mask = CAUSAL if causal else ALL
    part = Plain(SCALE).forward((query,), (key, value), mask)
    assert_close(Plain(SCALE).output(part), out, "float64")
    assert_close(part.lse, lse, "float64")
    near, far = Plain(SCALE).backward(grad, (query,), (key, value), part, mask)
    for a, b in zip((*near, *far), expected, strict=True):
        assert_close(a, b, "float64")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_plain_sums_in_fp32_and_answers_in_the_dtype_it_got(dtype: torch.dtype) -> None:
    query, key, value = (x.to(dtype) for x in inputs(7, 7, 6, 2))
    part = Plain(SCALE).forward((query,), (key, value), CAUSAL)
    out, lse = Plain(SCALE).output(part), part.lse
    expected, expected_lse = attention(query.double(), key.double(), value.double(), True)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert_close(out, expected, str(dtype).removeprefix("torch."))
    assert_close(lse, expected_lse, "float32")
    near, far = Plain(SCALE).backward(torch.ones_like(out), (query,), (key, value), part, CAUSAL)
    assert [x.dtype for x in (*near, *far)] == [dtype] * 3


@by_heads
def test_gradients_of_parts_add_up_to_those_of_the_whole(heads: int, groups: int) -> None:
    """A backward is given output and log-sum-exp over all keys, and returns the gradients of its own."""
    query, key, value = (x.requires_grad_() for x in inputs(6, 11, heads, groups))
    out, lse = attention(query, key, value, causal=False)
    grad = randn(*out.shape, seed=4)
    dq, dk, dv = torch.autograd.grad(out, (query, key, value), grad)
    total = torch.zeros_like(dq)
    query, key, value, out, lse = (x.detach() for x in (query, key, value, out, lse))
    for rows in (slice(0, 4), slice(4, 11)):
        near, far = Plain(SCALE).backward(grad, (query,), (key[rows], value[rows]), Part((out,), lse), ALL)
        total += near[0]
        assert_close(far[0], dk[rows], "float64")
        assert_close(far[1], dv[rows], "float64")
    assert_close(total, dq, "float64")


Merge = Callable[[Tensor, Tensor, Tensor, Tensor], None]


@merges
@pytest.mark.parametrize("n", [1, 5, 150])
def test_merged_parts_equal_attention_to_the_union_of_their_keys(merge: Merge, kind: str, n: int) -> None:
    query, key, value = inputs(n, 13, 6, 2)
    expected, expected_lse = attention(query, key, value, causal=False)
    (out, lse), *others = (attention(query, key[i:j], value[i:j], False) for i, j in ((0, 3), (3, 4), (4, 13)))
    out, lse = (x.to(DEVICE, getattr(torch, kind)).contiguous() for x in (out, lse))
    for part in others:
        merge(out, lse, *(x.to(out) for x in part))
    assert_close(out, expected, kind)
    assert_close(lse, expected_lse, kind)


@merges
def test_merge_writes_late_rows_in_place_and_no_others(merge: Merge, kind: str) -> None:
    """As the ring does: keys of a later rank are seen by the second half of the rows."""
    query, key, value = inputs(8, 13, 6, 2)
    first, first_lse = (x.to(DEVICE, getattr(torch, kind)) for x in attention(query, key[:5], value[:5], False))
    # the result of a block is tokens-first by strides alone
    out, lse = first.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3), first_lse.clone()
    late = slice(4, None)
    part, part_lse = attention(query[late], key[5:], value[5:], False)
    merge(out[late], lse[..., late], part.to(out), part_lse.to(out))
    assert torch.equal(out[:4], first[:4])
    assert torch.equal(lse[..., :4], first_lse[..., :4])
    expected, expected_lse = attention(query, key, value, False)
    assert_close(out[late], expected[late], kind)
    assert_close(lse[..., late], expected_lse[..., late], kind)


@merges
@pytest.mark.parametrize("far", [-1e4, 1e4])
def test_a_part_that_outweighs_the_other_by_far_stands_alone(merge: Merge, kind: str, far: float) -> None:
    dtype = getattr(torch, kind)
    out, part = (randn(4, 2, 3, 5, seed=i).to(DEVICE, dtype) for i in (1, 2))
    lse, part_lse = (randn(2, 3, 4, seed=i).to(DEVICE, dtype) for i in (3, 4))
    lse += far
    winner, winner_lse = (out.clone(), lse.clone()) if far > 0 else (part, part_lse)
    merge(out, lse, part, part_lse)
    assert torch.equal(out, winner)
    assert torch.equal(lse, winner_lse)


@pytest.mark.parametrize("merge", [merge_torch, merge_kernel], ids=["torch", "kernel"])
def test_a_result_in_half_precision_is_merged_in_wide_sums(merge: Merge) -> None:
    out, part = (randn(4, 2, 3, 5, seed=i).to(DEVICE, torch.float16) for i in (1, 2))
    lse, part_lse = (randn(2, 3, 4, seed=i).to(DEVICE, torch.float32) for i in (3, 4))
    weight = torch.sigmoid(lse.double() - part_lse.double()).permute(2, 0, 1).unsqueeze(-1)
    exact = out.double() * weight + part.double() * (1 - weight)
    merge(out, lse, part, part_lse)
    error = (out.double() - exact).abs() / exact.abs().clamp(min=2**-14)
    assert error.max() < 2**-11 * 1.01  # rounded once
