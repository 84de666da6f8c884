"""Packed documents against loops over each of them, and that each is as if it were alone."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from megatron_lighthouse import LighthouseConfig, lighthouse_attention, lighthouse_select
from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.lighthouse.attention import packed_rows
from megatron_lighthouse.lighthouse.packed.packing import Packing
from megatron_lighthouse.lighthouse.packed.rule import Rule
from megatron_lighthouse.lighthouse.rotary import Rotary
from megatron_lighthouse.sequence.documents import Documents
from tests.context_parallel.shards import exchange_of
from tests.packed_oracle import Packed, attention, of, rows
from tests.steps import DEVICE, random_like, tensors
from tests.tolerances import assert_close

thorough = settings(deadline=None, derandomize=True, max_examples=40)
ROW = of((1, 40, 37, 64, 3, 100, 5, 33))
ROTARY = Rotary(torch.tensor([0.8, 0.1]))


def config_of(packed: Packed, **options: Any) -> LighthouseConfig:
    return LighthouseConfig(**packed.options, **options)


def bounds(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)


def forward_backward(inputs: list[Tensor], config: LighthouseConfig, grad: Tensor, **how: Any) -> list[Tensor]:
    """Output and the three gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = lighthouse_attention(*leaves, config, **how)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@thorough
@given(rows())
def test_equals_the_oracle(packed: Packed) -> None:
    inputs, config = tensors(packed), config_of(packed)
    cu_seqlens = bounds(*packed.lengths)
    chosen, expected = attention(*packed.arrays(), packed)
    assert_close(lighthouse_attention(*inputs, config, cu_seqlens=cu_seqlens), expected, "float64")
    packing = Packing.of(Documents.of(cu_seqlens, packed.seq_length), config.rule)
    starts = packing.bounds[1].tolist()

    def number(document: int, level: int, i: int) -> int:
        if level == 0:
            return packed.bounds[document] + i
        return packing.offset(level) + starts[document] * packed.window // packed.pooling**level + i

    numbers = [[number(document, *entry) for document, entry in group] for group in chosen]
    assert lighthouse_select(*inputs[:2], config, cu_seqlens=cu_seqlens).tolist() == [numbers]
    assert packing.rows.lengths == tuple(np.bincount([document for document, _ in chosen[0]]))


@pytest.mark.parametrize("rotary", [None, ROTARY], ids=["mean", "last"])
@pytest.mark.parametrize("pin_first", [True, False], ids=["pin", "no pin"])
@pytest.mark.parametrize("scorer", ["norm", "mass", "summary", "dilated", "gla"])
def test_each_document_equals_it_alone(scorer: str, pin_first: bool, rotary: Rotary | None) -> None:
    packed = of(ROW.lengths, pin_first=pin_first)
    inputs, config = tensors(packed), config_of(packed, scorer=scorer)
    (grad,) = random_like(inputs[:1])
    together = forward_backward(inputs, config, grad, cu_seqlens=bounds(*packed.lengths), rotary=rotary)
    start = 0
    for length in packed.lengths:
        here = slice(start, start + length)
        alone = forward_backward([x[here] for x in inputs], config, grad[here], cu_seqlens=bounds(length), rotary=rotary)
        for a, b in zip(together, alone, strict=True):
            assert_close(a[here], b, "float64")
        start += length


@pytest.mark.parametrize("rotary", [None, ROTARY], ids=["mean", "last"])
@pytest.mark.parametrize("scorer", ["norm", "mass", "summary", "dilated", "gla"])
def test_a_document_of_whole_tiles_equals_the_sequence(scorer: str, rotary: Rotary | None) -> None:
    packed = of((96,), groups=2)
    inputs, config = tensors(packed), config_of(packed, scorer=scorer)
    plain = config.replace(budget=3 * packed.tile_budget)  # three tiles of eight windows of four
    (grad,) = random_like(inputs[:1])
    how: dict[str, Any] = {"rotary": rotary, "softmax_scale": 0.9}
    actual = forward_backward(inputs, config, grad, cu_seqlens=bounds(96), **how)
    for a, b in zip(actual, forward_backward(inputs, plain, grad, **how), strict=True):
        assert_close(a, b, "float64")
    numbers = lighthouse_select(*inputs[:2], config, value=inputs[2], cu_seqlens=bounds(96), **how)
    assert torch.equal(numbers, lighthouse_select(*inputs[:2], plain, value=inputs[2], **how))


def test_documents_that_would_not_become_fewer_rows_are_dense() -> None:
    packed = of((8,) * 100 + (7, 3), tile_budget=8)
    inputs, (grad,) = tensors(packed), random_like(tensors(packed)[:1])
    actual = forward_backward(inputs, config_of(packed), grad, cu_seqlens=bounds(*packed.lengths))
    leaves = [x.detach().requires_grad_() for x in inputs]
    start, parts = 0, []
    for length in packed.lengths:
        q, k, v = (x[start : start + length].permute(1, 2, 0, 3) for x in leaves)
        dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        parts.append(dense.permute(2, 0, 1, 3))
        start += length
    out = torch.cat(parts)
    for a, b in zip(actual, [out, *torch.autograd.grad(out, leaves, grad)], strict=True):
        assert_close(a, b, "float64")


@pytest.mark.parametrize("scorer", ["norm", "mass", "summary", "dilated", "gla"])
def test_no_token_of_a_document_influences_another(scorer: str) -> None:
    config, cu_seqlens, inputs = config_of(ROW, scorer=scorer), bounds(*ROW.lengths), tensors(ROW)
    others = random_like(inputs)
    (grad,) = random_like(inputs[:1])
    for changed in (1, 5):  # one that ends within a window, and the longest
        here = slice(*ROW.bounds[changed : changed + 2])
        only = torch.zeros_like(grad)
        only[here] = grad[here]
        replaced = [x.clone() for x in inputs]
        for x, other in zip(replaced, others, strict=True):
            x[here] = 10 * other[here]
        before, *grads = forward_backward(inputs, config, only, cu_seqlens=cu_seqlens)
        after = lighthouse_attention(*replaced, config, cu_seqlens=cu_seqlens)
        outside = torch.ones(len(grad), dtype=torch.bool)
        outside[here] = False
        assert torch.equal(before[outside], after[outside])
        assert not torch.equal(before[here], after[here])
        assert all(not x[outside].any() and x[here].any() for x in grads)


def test_gradients_are_those_of_finite_differences() -> None:
    packed = of((2, 13), levels=2, groups=1, dim=2)
    rotary = Rotary(torch.tensor([0.8]), interleaved=True)
    inputs, config, cu_seqlens = [x.requires_grad_() for x in tensors(packed)], config_of(packed), bounds(2, 13)
    selection = packed_rows(*inputs, config, cu_seqlens).selection  # a step of the differences must not move a choice

    def attend(*qkv: Tensor) -> Tensor:
        return lighthouse_attention(*qkv, config, rotary=rotary, selection=selection, cu_seqlens=cu_seqlens)

    assert torch.autograd.gradcheck(attend, inputs)


def test_positions_may_begin_anywhere() -> None:
    """Queries and keys that are rotated from the row's first token give what those from their document's give."""
    inputs, config, cu_seqlens = tensors(ROW), config_of(ROW), bounds(*ROW.lengths)
    documents = Documents.of(cu_seqlens, ROW.seq_length)
    outputs = []
    for positions in (documents.positions, torch.arange(ROW.seq_length)):
        q, k = (ROTARY.turn(x.unsqueeze(0), positions).squeeze(0) for x in inputs[:2])
        outputs.append(lighthouse_attention(q, k, inputs[2], config, cu_seqlens=documents, rotary=ROTARY))
    assert_close(*outputs, "turned rows")


def test_a_given_attention_gets_the_documents_of_the_rows() -> None:
    seen: list[Documents] = []

    def attend(query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
        seen.append(documents)
        assert query.shape == (documents.tokens, 1, 4, 4)
        assert key.shape == value.shape == (documents.tokens, 1, 2, 4)
        return query

    lighthouse_attention(*tensors(ROW), config_of(ROW), attend=attend, cu_seqlens=bounds(*ROW.lengths))
    rule = config_of(ROW).rule
    assert seen[0].lengths == tuple(rule.rows(length) for length in ROW.lengths)
    assert seen[0].cu_seqlens.diff().tolist() == list(seen[0].lengths)


def test_boundaries_are_read_once_until_they_are_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, config, cu_seqlens = tensors(of((40,))), config_of(ROW), bounds(20, 20)
    read, made = [], []
    of_tensor, of_row = Documents.of, Packing.of
    monkeypatch.setattr(Documents, "of", lambda x, *rest: read.append(x.tolist()) or of_tensor(x, *rest))
    monkeypatch.setattr(Packing, "of", lambda documents, rule: made.append(documents) or of_row(documents, rule))
    for _ in range(3):
        first = lighthouse_attention(*inputs, config, cu_seqlens=cu_seqlens)
    assert len(read) == len({*map(id, made)}) == 1
    cu_seqlens[1] = 7
    second = lighthouse_attention(*inputs, config, cu_seqlens=cu_seqlens)
    assert read == [[0, 20, 40], [0, 7, 40]]
    assert torch.equal(second, lighthouse_attention(*inputs, config, cu_seqlens=bounds(7, 33)))
    assert not torch.equal(first, second)
    cu_seqlens[1] = 50
    with pytest.raises(ValueError, match="must increase"):
        lighthouse_attention(*inputs, config, cu_seqlens=cu_seqlens)
    with torch.inference_mode():
        ours = bounds(7, 33)
        assert torch.equal(lighthouse_attention(*inputs, config, cu_seqlens=ours), second)


def test_boundaries_that_nobody_holds_are_forgotten() -> None:
    gone = weakref.ref(lengths := bounds(20, 20))
    lighthouse_attention(*tensors(of((40,))), config_of(ROW), cu_seqlens=lengths)
    del lengths
    assert gone() is None


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        pytest.param([1, 40], "must begin with 0", id="not from 0"),
        pytest.param([0, 20, 20, 40], "must increase", id="a document without tokens"),
        pytest.param([0, 30, 20, 40], "must increase", id="falls"),
        pytest.param([0, 20, 39], "must end at the row's 40 tokens", id="ends early"),
        pytest.param([0, 20, 41], "must end at the row's 40 tokens", id="ends late"),
        pytest.param([0], "have an entry for each document's end", id="none"),
    ],
)
def test_wrong_boundaries_are_refused(wrong: list[int], rule: str) -> None:
    inputs = tensors(of((40,)))
    for function, taken in ((lighthouse_attention, inputs), (lighthouse_select, inputs[:2])):
        with pytest.raises(ValueError, match=rule):
            function(*taken, config_of(ROW), cu_seqlens=torch.tensor(wrong, dtype=torch.int32, device=DEVICE))


def test_other_input_that_does_not_fit_is_refused() -> None:
    inputs, config, right = tensors(of((40,))), config_of(ROW), bounds(20, 20)
    for cu_seqlens, rule in (
        (right.long(), "must be int32"),
        (right.unsqueeze(0), "must be int32"),
        (right.to("meta"), "must be where the tokens are"),
        (Documents.of(bounds(20, 19), 39), "is of 39 tokens"),
    ):
        with pytest.raises(ValueError, match=rule):
            lighthouse_attention(*inputs, config, cu_seqlens=cu_seqlens)
    with pytest.raises(TypeError, match=r"cu_seqlens must be a torch\.Tensor or .*Documents, not a list"):
        lighthouse_attention(*inputs, config, cu_seqlens=[0, 20, 40])
    with pytest.raises(ValueError, match=r"lay rows end to end, \[N \* B, 1, H, D\]"):
        lighthouse_attention(*(x.repeat(1, 2, 1, 1) for x in inputs), config, cu_seqlens=right)
    chosen = packed_rows(*inputs, config, bounds(40)).selection
    with pytest.raises(ValueError, match="selection was made for"):
        lighthouse_attention(*inputs, config, cu_seqlens=right, selection=chosen)
    for scorer in ("dilated", "gla"):
        odd = LighthouseConfig(levels=2, pooling=2, budget=2, tile_budget=2, scorer=scorer)
        with pytest.raises(ValueError, match=f"config.scorer {scorer} takes every 4th token of a document"):
            lighthouse_attention(*inputs, odd, cu_seqlens=right)


def test_what_context_parallel_ranks_cannot_share_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Exchange, "over", lambda group: exchange_of(4, 1))
    inputs, config = tensors(of((10,))), config_of(ROW)
    for function, taken in ((lighthouse_attention, inputs), (lighthouse_select, inputs[:2])):
        with pytest.raises(ValueError, match="must end at the row's 40 tokens, got 10"):
            function(*taken, config, cu_seqlens=bounds(10))
        with pytest.raises(ValueError, match="ends at 36 tokens, which 4 context-parallel ranks cannot share"):
            function(*(x[:9] for x in taken), config, cu_seqlens=bounds(20, 16))
        with pytest.raises(ValueError, match="is of 10 tokens on cpu, and the row of 40"):
            function(*taken, config, cu_seqlens=Documents.of(bounds(10), 10))
    chosen = packed_rows(*tensors(of((40,))), config, bounds(40)).selection
    with pytest.raises(ValueError, match="a selection can be given without context parallelism alone"):
        lighthouse_attention(*inputs, config, cu_seqlens=bounds(40), selection=chosen)


def test_the_rule_is_asked_once_for_each_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row has many documents, and few lengths: at most sqrt(2t) of t tokens."""
    inner, asked = Rule.counts, []
    monkeypatch.setattr(Rule, "counts", lambda rule, tokens: asked.append(tokens) or inner(rule, tokens))
    packing = Packing.of(Documents.of(bounds(*(40, 64, 3, 40) * 9), 147 * 9), config_of(ROW).rule)
    assert packing.rows.tokens == packing.gathered_length == int(packing.bounds[2, -1])
    assert packing.budget == int(packing.tiles[3].sum())
    assert sorted(asked) == [3, 40, 64]
