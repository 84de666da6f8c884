"""All documents in one call of FlashAttention, which is not here: against document by document, by a stand-in that keeps its
contract."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_lighthouse.context_parallel.parts import Mask, Part
from megatron_lighthouse.softmax import document_blocks
from megatron_lighthouse.softmax.blocks import BLOCKS
from megatron_lighthouse.softmax.document_blocks import AllAtOnce, OneByOne, OverDocuments
from tests.context_parallel.test_documents import SCALE, packed, row_of
from tests.tolerances import assert_close

PLAIN = BLOCKS["sdpa"](SCALE)


def masks_of(ranks: int) -> list[Mask]:
    """Those that the schemes use of rank 0 and the last one."""
    own, last = (0, 2 * ranks - 1), (ranks - 1, ranks)
    return [Mask(own, own), Mask(own[1:], last), Mask(last, own[:1])]


def each(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int
) -> list[tuple[tuple[slice, slice], tuple[Tensor, ...]]]:
    """What the kernel asks, and the rows of each document."""
    for cu, x in ((cu_q, q), (cu_k, k)):
        assert cu.dtype == torch.int32
        assert cu.is_contiguous()
        assert cu[-1] == len(x)
    assert max_q >= max(2, int(cu_q.diff().max()))  # at 1 it takes every document for one of one row
    assert max_k >= int(cu_k.diff().max())
    ends = zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True)
    rows = [(slice(*near), slice(*far)) for near, far in ends]
    return [((n, f), tuple(x[at].unsqueeze(1) for x, at in ((q, n), (k, f), (v, f)))) for n, f in rows]


def forward(q: Tensor, k: Tensor, v: Tensor, *how: Any, scale: float) -> tuple[Tensor, ...]:
    *where, dropout, causal, debug = how
    assert (dropout, debug, scale) == (0.0, False, SCALE)
    out, lse = q.new_zeros(*q.shape[:2], v.shape[2]), q.new_full((q.shape[1], len(q)), torch.inf)
    for (near, far), (query, *others) in each(q, k, v, *where):
        if far.start < far.stop and near.start < near.stop:
            part = PLAIN.forward((query,), tuple(others), Mask((0,), (0,)) if causal else Mask((1,), (0,)))
            out[near], lse[:, near] = part.averages[0].squeeze(1), part.lse[0]
    return out, lse, *torch.empty(3)


def backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *how: Any, scale: float) -> list[Tensor]:
    *where, _, causal, _, _ = how
    assert all(x.is_contiguous() for x in (g, out, lse))
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    for (near, far), (query, *others) in each(q, k, v, *where):
        if far.start < far.stop and near.start < near.stop:
            part = Part((out[near].unsqueeze(1),), lse[:, near].unsqueeze(0))
            mask = Mask((0,), (0,)) if causal else Mask((1,), (0,))
            found = PLAIN.backward(g[near].unsqueeze(1), (query,), tuple(others), part, mask)
            for x, at, grad in zip(grads, (near, far, far), (y for of in found for y in of), strict=True):
                x[at] = grad.squeeze(1)
    return grads


@settings(max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(packed(), st.sampled_from([(4, 2), (2, 2)]))
def test_all_at_once_equals_one_by_one(
    monkeypatch: pytest.MonkeyPatch, drawn: tuple[int, list[int]], heads: tuple[int, int]
) -> None:
    kernel = SimpleNamespace(_flash_attention_forward=forward, _flash_attention_backward=backward)
    monkeypatch.setattr(document_blocks, "aten", kernel)
    ranks, lengths = drawn
    documents = row_of(lengths)

    def rows(chunks: Sequence[int], count: int) -> Tensor:
        return torch.randn(len(chunks) * documents.tokens // (2 * ranks), 1, count, 8, dtype=torch.float64)

    for mask in masks_of(ranks)[: 1 if ranks == 1 else None]:
        query, grad = (rows(mask.near, heads[0]) for _ in range(2))
        key, value = (rows(mask.far, heads[1]) for _ in range(2))
        blocks = [OverDocuments(within, documents, ranks) for within in (OneByOne(PLAIN), AllAtOnce(SCALE))]
        expected, part = (block.forward((query,), (key, value), mask) for block in blocks)
        assert torch.equal(part.lse.isneginf(), expected.lse.isneginf())
        assert_close(part.lse.nan_to_num(neginf=0), expected.lse.nan_to_num(neginf=0), "float64")
        for block in blocks:
            assert_close(block.output(part), block.output(expected), "float64")
        # as where the part is that of other keys too, which every row sees some of
        merged = Part(expected.averages, expected.lse.clamp(min=-5.0))
        ways = [block.backward(grad, (query,), (key, value), merged, mask) for block in blocks]
        for a, b in zip(*((x for of in way for x in of) for way in ways), strict=True):
            assert_close(a, b, "float64")
