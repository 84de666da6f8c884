"""Zigzag arithmetic: which rank holds which chunk, and how the ranks' tokens make a sequence."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.sequence.layout import Layout
from tests.context_parallel.shards import exchange_of, shard, whole

sizes = st.integers(1, 64)


def held(size: int) -> list[int]:
    """The chunks in the order in which the ranks' tokens, laid end to end, hold them."""
    return [chunk for rank in range(size) for chunk in Layout(size, rank).chunks]


@pytest.mark.parametrize(
    ("size", "chunks", "order"),
    [
        (1, [(0, 1)], [0, 1]),
        (2, [(0, 3), (1, 2)], [0, 2, 3, 1]),
        (4, [(0, 7), (1, 6), (2, 5), (3, 4)], [0, 2, 4, 6, 7, 5, 3, 1]),
    ],
)
def test_worked_examples(size: int, chunks: list[tuple[int, int]], order: list[int]) -> None:
    assert [Layout(size, rank).chunks for rank in range(size)] == chunks
    assert all(Layout(size, rank).order() == order for rank in range(size))


@given(sizes)
def test_every_chunk_is_held_once_and_by_its_owner(size: int) -> None:
    assert sorted(held(size)) == list(range(2 * size))
    for rank in range(size):
        assert [Layout(size, 0).owner(chunk) for chunk in Layout(size, rank).chunks] == [rank, rank]


@given(sizes)
def test_order_is_a_permutation_that_puts_chunks_in_sequence(size: int) -> None:
    order = Layout(size, size - 1).order()
    assert sorted(order) == list(range(2 * size))
    assert [held(size)[place] for place in order] == list(range(2 * size))


@given(sizes)
def test_causal_attention_costs_every_rank_the_same(size: int) -> None:
    assert {sum(Layout(size, rank).chunks) for rank in range(size)} == {2 * size - 1}


@given(st.integers(2, 16), st.integers(1, 3))
def test_tokens_go_to_ranks_and_come_back(size: int, length: int) -> None:
    sequence = torch.arange(2 * size * length * 3).view(-1, 3)
    shards = [shard(sequence, size, rank) for rank in range(size)]
    assert torch.equal(whole(shards), sequence)
    for rank in range(size):
        exchange = exchange_of(size, rank)
        assert torch.equal(exchange.own(sequence), shards[rank])
        assert torch.equal(exchange.out_of_order(sequence), torch.stack(shards))
        assert torch.equal(exchange.in_order(torch.stack(shards)), sequence)


def test_without_a_group_or_in_a_group_of_one_there_is_nobody_to_exchange_with() -> None:
    alone: Any = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    assert Exchange.over(None) is None
    assert Exchange.over(alone) is None
