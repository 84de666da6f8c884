"""Windows and sinks within documents: each document against the formula in float64, and several ranks against one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from megatron_lighthouse.context_parallel.document_windows import Windows
from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.sequence.layout import Layout
from megatron_lighthouse.softmax.documents import documents_attention
from megatron_lighthouse.softmax.sharded_documents import sharded_documents_attention
from tests.context_parallel.shards import Group
from tests.context_parallel.test_documents import LENGTHS, few, packed, row_of
from tests.ranks import run_ranks
from tests.test_sinks import SCALE, answers, formula, sinks_like
from tests.tolerances import assert_close

NONE = -1e9
"""A sink that no row can tell from none."""
SEEN = {"sinks": (None, True), "a window": (5, False), "a token and its last": (1, True), "a long window": (40, True)}


def inputs_of(tokens: int) -> list[Tensor]:
    """q, k, v, which is wider, and a gradient."""
    draw = torch.Generator().manual_seed(tokens)
    heads = ((4, 8), (2, 8), (2, 12), (4, 12))
    return [torch.randn(tokens, 1, *shape, generator=draw, dtype=torch.float64) for shape in heads]


def alone(lengths: list[int], window: int | None, sinks: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """By the formula, a document at a time."""

    def attend(q: Tensor, k: Tensor, v: Tensor, own: Tensor) -> Tensor:
        return torch.cat([formula(*part, own, window) for part in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)])

    return answers(attend, *inputs, sinks)


def with_sinks(attend: Callable[..., Tensor], lengths: list[int], given: bool) -> Callable[..., Tensor]:
    """As `answers` calls it; sinks that are not given have a gradient of 0."""
    documents = row_of(lengths)

    def call(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        return attend(q, k, v, documents, *([sinks] if given else [])) + 0 * sinks.sum()

    return call


def sinks_of(query: Tensor, given: bool) -> Tensor:
    return sinks_like(query) if given else torch.full((query.shape[2],), NONE, dtype=query.dtype)


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_each_document_is_as_if_alone(seen: str, lengths: list[int]) -> None:
    window, given = SEEN[seen]
    inputs = inputs_of(sum(lengths))
    sinks = sinks_of(inputs[0], given)
    attend = documents_attention("auto", inputs[0], inputs[1], SCALE, value_dim=12, window=window, sinks=given)
    found = answers(with_sinks(attend, lengths, given), *inputs, sinks)
    for a, b in zip(found, alone(lengths, window, sinks, inputs), strict=True):
        assert_close(a, b, "float64")


def on_ranks(group: Group) -> dict[tuple[str, str, str], list[Tensor]]:
    exchange = Exchange.over(group)
    assert exchange is not None
    found = {}
    for (name, lengths), seen, comm_type in product(LENGTHS.items(), SEEN, ("p2p", "all_gather", "a2a")):
        window, given = SEEN[seen]
        if comm_type == "a2a" and exchange.size > 2:  # of two key/value heads
            continue
        documents = row_of(lengths)
        rows = documents.rows_of_rank(exchange.layout)
        inputs = inputs_of(sum(lengths))
        how = (inputs[0], inputs[1], exchange, comm_type, SCALE)
        attend = sharded_documents_attention("auto", *how, value_dim=12, window=window, sinks=given)
        own = [x[rows] for x in inputs]
        found[name, seen, comm_type] = answers(with_sinks(attend, lengths, given), *own, sinks_of(inputs[0], given))
    return found


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_have_the_answers_of_one(size: int) -> None:
    ranks = run_ranks(size, on_ranks)
    for name, seen, comm_type in ranks[0]:
        lengths, (window, given) = LENGTHS[name], SEEN[seen]
        inputs = inputs_of(sum(lengths))
        expected = alone(lengths, window, sinks_of(inputs[0], given), inputs)
        rows = [row_of(lengths).rows_of_rank(Layout(size, rank)) for rank in range(size)]
        for rank, held in enumerate(rows):
            for a, b in zip(ranks[rank][name, seen, comm_type][:-1], expected[:-1], strict=True):
                assert_close(a, b[held], "float64")
        total = sum(found[name, seen, comm_type][-1] for found in ranks)
        assert_close(total, expected[-1], "float64")


@few
@given(packed())
def test_far_rows_are_the_window_before_each_run_and_the_run(drawn: tuple[int, list[int]]) -> None:
    """What each end of the transfer lists is what the other does."""
    size, lengths = drawn
    assume(size > 1)
    documents = row_of(lengths)
    windows = [Windows(documents, Layout(size, rank), 3) for rank in range(size)]
    held = [documents.rows_of_rank(Layout(size, rank)) for rank in range(size)]
    for rank, window in enumerate(windows):
        tokens, _ = window._tokens(rank)
        near, far = (torch.tensor(runs.lengths).cumsum(0).tolist() for runs in (window.near, window.far))
        assert (near[-1], far[-1]) == (len(held[rank]), len(tokens))
        for near_end, far_end, length, seen in zip(near, far, window.near.lengths, window.far.lengths, strict=True):
            own, run = held[rank][near_end - length : near_end], tokens[far_end - seen : far_end]
            assert torch.equal(run[-length:], own)
            before = min(3, int(documents.positions[own[0]]))
            assert torch.equal(run, torch.arange(int(own[0]) - before, int(own[-1]) + 1))
    for here, there in product(range(size), range(size)):
        away, came = windows[here].way.here, windows[there].way.there
        assert away.counts[there] == came.counts[here]
        first, last = sum(away.counts[:there]), sum(came.counts[:here])
        sent = held[here][away.rows[first : first + away.counts[there]]]
        tokens, _ = windows[there]._tokens(there)
        assert torch.equal(sent, tokens[came.rows[last : last + came.counts[here]]])


@few
@given(packed(), st.integers(0, 20))
def test_copies_of_a_token_are_numbered_in_order_of_the_chunks_that_want_it(drawn: tuple[int, list[int]], before: int) -> None:
    """By chunks: those of a token's document, from its own on, of which a token sees it."""
    size, lengths = drawn
    assume(size > 1)
    documents, wanted, most = row_of(lengths), list[tuple[int, int, int]](), 0
    chunk_of = torch.empty(documents.tokens, dtype=torch.int64)
    for chunk in range(2 * size):
        chunk_of[documents.rows_of(chunk, size)] = chunk
    document_of = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    for token, document in enumerate(document_of.tolist()):
        seeing = chunk_of[token : token + before + 1][document_of[token : token + before + 1] == document].unique().tolist()
        wanted += [(token, copy, chunk) for copy, chunk in enumerate(seeing)]
        most = max(most, len(seeing))
    found = []
    for rank in range(size):
        window = Windows(documents, Layout(size, rank), before)
        tokens, copies = window._tokens(rank)
        chunks = torch.cat([chunk_of[tokens[i - 1]].expand(n) for i, n in zip(ends(window), window.far.lengths, strict=True)])
        found += [*zip(tokens.tolist(), copies.tolist(), chunks.tolist(), strict=True)]
        assert most <= window.copies <= min(2 * (most + 1), 2 * size)
    assert sorted(found) == wanted


def ends(window: Windows) -> list[int]:
    """Of each run, in far rows."""
    found: list[int] = torch.tensor(window.far.lengths).cumsum(0).tolist()
    return found


def test_copies_are_few_on_many_ranks() -> None:
    assert Windows(row_of([8192, 4 * 8192]), Layout(64, 3), 127).copies == 4


@pytest.mark.parametrize(("how", "says"), [((5, False), "with a window of"), ((5, True), "with sinks of")])
def test_what_is_chosen_for_is_said(how: tuple[int, bool], says: str, caplog: pytest.LogCaptureFixture) -> None:
    query, key = torch.empty(8, 1, 6, 24), torch.empty(8, 1, 3, 24)  # of which no other test makes any
    documents_attention("auto", query, key, SCALE, window=how[0], sinks=how[1])
    assert f"the inner attention {says} float32, 6 query and 3 key/value heads of 24 is" in caplog.text
