"""Documents on several ranks: who holds their tokens, and attention within each of them against one rank."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.context_parallel.schemes import COMM_TYPES
from megatron_lighthouse.sequence.documents import Documents
from megatron_lighthouse.sequence.layout import Layout
from megatron_lighthouse.softmax.sharded_documents import sharded_documents_attention
from tests.context_parallel.shards import Group, shard
from tests.ranks import SIZES, run_ranks
from tests.tolerances import assert_close

few = settings(deadline=None, derandomize=True, max_examples=25)
SCALE = 0.3


def row_of(lengths: Sequence[int]) -> Documents:
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return Documents.of(bounds, sum(lengths))


def rows_of_ranks(documents: Documents, size: int) -> list[Tensor]:
    return [documents.rows_of_rank(Layout(size, rank)) for rank in range(size)]


@st.composite
def packed(draw: st.DrawFn) -> tuple[int, list[int]]:
    """C, and lengths whose sum 2C divides."""
    size, lengths = draw(st.integers(1, 8)), draw(st.lists(st.integers(1, 40), min_size=1, max_size=12))
    return size, [*lengths, *[rest for rest in (-sum(lengths) % (2 * size),) if rest]]


@few
@given(packed())
def test_every_token_is_held_once_by_ranks_that_hold_as_many(drawn: tuple[int, list[int]]) -> None:
    size, lengths = drawn
    documents = row_of(lengths)
    held = rows_of_ranks(documents, size)
    assert {len(x) for x in held} == {sum(lengths) // size}
    assert torch.equal(torch.cat(held).sort().values, torch.arange(sum(lengths)))
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    for rows in held:
        for chunk in rows.chunk(2):  # an early and a late one, each in the order of the row
            assert (chunk.diff() > 0).all()
        assert (
            torch.stack([owner[rows].bincount(minlength=len(lengths)) * size - torch.tensor(lengths)]).abs().max() <= 2 * size
        )


@few
@given(packed())
def test_chunks_of_a_document_follow_each_other_and_differ_by_a_token_at_most(drawn: tuple[int, list[int]]) -> None:
    size, lengths = drawn
    documents, ends = row_of(lengths), torch.tensor(lengths).cumsum(0)
    bounds = [documents.cu_seqlens_of(chunk, size) for chunk in range(2 * size)]
    rows = [documents.rows_of(chunk, size) for chunk in range(2 * size)]
    for i, length in enumerate(lengths):
        parts = [x[b[i] : b[i + 1]] for x, b in zip(rows, bounds, strict=True)]
        assert torch.equal(torch.cat(parts), torch.arange(int(ends[i]) - length, int(ends[i])))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    row, owner = torch.arange(sum(lengths)), torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    every = documents.in_chunks(range(2 * size), size)
    assert torch.equal(every.in_documents(torch.cat(rows)), row)
    assert torch.equal(every.in_order(row), torch.cat(rows))
    for chunks in {(0, 2 * size - 1), (size - 1, size), (size,), tuple(range(2 * size))}:
        own = documents.in_chunks(chunks, size)
        tokens = torch.cat([rows[chunk] for chunk in chunks])
        assert torch.equal(own.in_documents(tokens), tokens.sort().values)
        assert torch.equal(own.in_order(tokens.sort().values), tokens)
        assert own.cu_seqlens.diff().tolist() == [*own.lengths]
        assert [*own.lengths] == owner[tokens].bincount(minlength=len(lengths)).tolist()
    assert torch.equal(documents.positions, torch.cat([torch.arange(n) for n in lengths]))


@pytest.mark.parametrize("size", SIZES)
def test_one_document_is_held_as_one_sequence_is(size: int) -> None:
    for rank, rows in enumerate(rows_of_ranks(row_of([4 * size]), size)):
        assert torch.equal(rows, shard(torch.arange(4 * size), size, rank))


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        (torch.tensor([0, 4, 8]), r"int32 \[documents \+ 1\], got torch.int64 \(3,\)"),
        (torch.tensor([[0, 8]]).int(), r"got torch.int32 \(1, 2\)"),
        (torch.tensor([1, 8]).int(), r"begin with 0 .* got \[1, 8\]"),
        (torch.tensor([0]).int(), r"an entry for each document's end, got \[0\]"),
        (torch.tensor([0, 0, 8]).int(), "entry 1 is 0 after 0: leave out documents without tokens"),
        (torch.tensor([0, 5, 3, 8]).int(), "entry 2 is 3 after 5"),
        (torch.tensor([0, 8, 8]).int(), "entry 2 is 8 after 8: .* entries that only fill up"),
        (torch.tensor([0, 6]).int(), "end at the row's 8 tokens, got 6"),
        (torch.tensor([0, 1, 2, 3, 8]).int(), "has 4 documents, and a row may have 3: raise the bound"),
        (torch.tensor([0, 8]).int().to("meta"), "where the tokens are, cpu, got meta"),
    ],
)
def test_boundaries_that_break_a_rule_are_refused(bounds: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=r"cu_seqlens (must|has)") as refusal:
        Documents.of(bounds, 8, torch.device("cpu"), most=3)
    assert re.search(message, str(refusal.value))


def test_boundaries_that_are_not_contiguous_are_taken() -> None:
    every_other = torch.tensor([0, 9, 3, 9, 8, 9], dtype=torch.int32)[::2]
    assert not every_other.is_contiguous()
    documents = Documents.of(every_other, 8)
    assert documents.cu_seqlens.is_contiguous()  # as attention's kernels want it
    assert documents.cu_seqlens.tolist() == [0, 3, 8]


def test_a_row_that_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ends at 10 tokens, which 2 .* a multiple of 4 .* such as 12"):
        row_of([7, 3]).rows_of_rank(Layout(2, 0))


LENGTHS = {
    "shorter than the chunks are many": [1, 3, 2, 15, 1, 5, 37],
    "one over all ranks": [64],
    "some over all ranks": [33, 1, 94],
    "equal": [16] * 4,
    "of one token": [1] * 32,
}


def expected(documents: Documents, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Output and gradients by the formula, with a mask of the whole row."""
    query, key, value = (x.clone().requires_grad_() for x in inputs[:3])
    k, v = (x.repeat_interleave(query.shape[2] // key.shape[2], 2) for x in (key, value))
    owner = torch.repeat_interleave(torch.arange(len(documents.lengths)), torch.tensor(documents.lengths))
    seen = (owner[:, None] == owner) & torch.ones(len(owner), len(owner)).tril().bool()
    logits = torch.einsum("nbhd,mbhd->bhnm", query, k) * SCALE
    out = torch.einsum("bhnm,mbhd->nbhd", logits.masked_fill(~seen, -torch.inf).softmax(-1), v)
    return [out.detach(), *torch.autograd.grad(out, (query, key, value), inputs[3])]


def on_a_rank(group: Group, lengths: list[int], inputs: Sequence[Tensor], comm_type: str) -> list[Tensor]:
    exchange = Exchange.over(group)
    assert exchange is not None
    documents = row_of(lengths)
    rows = documents.rows_of_rank(exchange.layout)
    query, key, value = leaves = [x[rows].requires_grad_() for x in inputs[:3]]
    attend = sharded_documents_attention("auto", query, key, exchange, comm_type, SCALE)
    out = attend(query, key, value, documents)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs[3][rows])]


BY_ALL = ["shorter than the chunks are many", "some over all ranks"]
"""Those that are tried with every scheme; the others with one each."""


@pytest.mark.parametrize("size", SIZES, ids="CP={}".format)
@pytest.mark.parametrize(
    ("kind", "comm_type"),
    [*product(BY_ALL, COMM_TYPES), *zip([kind for kind in LENGTHS if kind not in BY_ALL], COMM_TYPES, strict=True)],
)
def test_attention_within_documents_equals_one_rank(kind: str, comm_type: str, size: int) -> None:
    lengths = LENGTHS[kind]
    groups = size if comm_type == "a2a" else 2
    generator = torch.Generator().manual_seed(3)
    kinds = ((2 * groups, 5), (groups, 5), (groups, 3), (2 * groups, 3))  # values, and so outputs, are narrower than keys
    inputs = [torch.randn(sum(lengths), 1, *kind, generator=generator, dtype=torch.float64) for kind in kinds]
    documents = row_of(lengths)
    answers = zip(*run_ranks(size, on_a_rank, lengths, inputs, comm_type), strict=True)
    back = torch.cat(rows_of_ranks(documents, size)).argsort()
    for parts, whole in zip(answers, expected(documents, inputs), strict=True):
        assert_close(torch.cat(parts)[back], whole, "ranks float64")
