"""Deal: ranks that hold different numbers of gathered rows attend to equally many."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_lighthouse import LighthouseConfig
from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.lighthouse.attention import attended_rows
from megatron_lighthouse.lighthouse.sharded.deal import Deal, _rows_between
from megatron_lighthouse.softmax.sharded import sharded_attention
from megatron_lighthouse.variant import Place
from tests.context_parallel.shards import exchange_of, inputs_of, layer, shards_of, together
from tests.oracle import Problem
from tests.ranks import SIZES, run_ranks
from tests.tolerances import assert_close

thorough = settings(derandomize=True, max_examples=100)
on_sizes = pytest.mark.parametrize("size", SIZES, ids="CP={}".format)

CROWDED = Problem(512, 3, 2, 8, 8, batch=2, groups=2, queries_per_group=2)
"""128 coarsest windows, at least 8 in a chunk, of which 8 are refined: into 16 entries of each finer level."""


def crowded(size: int, chunks: tuple[int, ...]) -> tuple[list[Tensor], LighthouseConfig]:
    """Long queries and keys in one chunk of each batch element and group, `chunks` in turn: there are the refined windows."""
    inputs = inputs_of(CROWDED)
    length = CROWDED.seq_length // (2 * size)
    for i in range(4):
        b, g, chunk = i // 2, i % 2, chunks[i % len(chunks)]
        inputs[0][chunk * length : (chunk + 1) * length, b, 2 * g : 2 * g + 2] *= 5
        inputs[1][chunk * length : (chunk + 1) * length, b, g] *= 5
    return inputs, LighthouseConfig(**CROWDED.options)  # type: ignore[arg-type]


def rows_of_rank(group: dist.ProcessGroup, inputs: list[Tensor], config: LighthouseConfig) -> tuple[int, int]:
    """Rows that this rank holds, and rows that it attends to."""
    query, key, value, _ = shards_of(group, inputs)
    exchange, seen = Exchange.over(group), []
    assert exchange is not None
    inner = sharded_attention("auto", query, key, exchange, "p2p")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append({len(x) for x in (q, k, v)})
        return inner(q, k, v)

    attended = attended_rows(query, key, value, config, Place(exchange=exchange, base_attends=True), attend=attend)
    assert len(seen) == 1
    assert len(seen[0]) == 1
    assert len(attended.rows) == attended.selection.length
    attended.scatter()  # takes what is still under way
    return attended.selection.length, seen[0].pop()


@on_sizes
@pytest.mark.parametrize("where", ["first", "last", "middle"])
def test_one_chunk_holds_nearly_all_refined_rows_and_every_rank_attends_to_as_many(size: int, where: str) -> None:
    chunk = {"first": 0, "last": 2 * size - 1, "middle": size}[where]
    inputs, config = crowded(size, (chunk,))
    length = config.geometry(CROWDED.seq_length).gathered_length
    answers = run_ranks(size, rows_of_rank, inputs, config)
    held = [rows for rows, _ in answers]
    owner, coarsest, refined = min(chunk, 2 * size - 1 - chunk), 128 // size, 32
    assert sum(held) == length == 128 + refined
    assert held[owner] >= coarsest + refined * 7 // 8  # all but the children of the first window, which is pinned
    assert all(rows <= coarsest + refined // 8 for rank, rows in enumerate(held) if rank != owner)
    assert [attended for _, attended in answers] == [length // size] * size


@pytest.mark.parametrize(
    ("comm_type", "size"), [("p2p", 2), ("p2p", 4), ("p2p", 8), ("all_gather", 4), ("a2a", 2)], ids="{}".format
)
def test_crowded_heads_equal_one_rank(comm_type: str, size: int) -> None:
    inputs, config = crowded(size, (0, 2 * size - 1, size, 1))
    *actual, entries = together(size, layer, inputs, config, comm_type)
    *expected, expected_entries = layer(None, inputs, config)
    assert torch.equal(entries, expected_entries)
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, "ranks float64")


@st.composite
def starts_of_chunks(draw: st.DrawFn) -> tuple[int, int, Tensor]:
    """Ranks C, rows in a chunk once dealt, and the first row of each chunk before: any, for each batch element and head."""
    size, share = draw(st.sampled_from([2, 3, 4, 8])), draw(st.integers(1, 5))
    total = 2 * size * share
    batch, groups = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    cuts = st.lists(st.integers(0, total), min_size=2 * size - 1, max_size=2 * size - 1).map(sorted)
    starts = [[0, *draw(cuts), total] for _ in range(batch * groups)]
    return size, share, torch.tensor(starts).view(batch, groups, -1)


@thorough
@given(starts_of_chunks())
def test_sender_and_receiver_agree_on_how_many_rows(drawn: tuple[int, int, Tensor]) -> None:
    size, share, starts = drawn
    counts = starts.diff(dim=-1).flatten().tolist()
    to, by = zip(*(_rows_between(counts, size, share, rank) for rank in range(size)), strict=True)
    for sender in range(size):
        for receiver in range(size):
            assert to[sender][receiver] == by[receiver][sender]
    heads = starts.shape[0] * starts.shape[1]
    assert [sum(x) for x in by] == [heads * 2 * share] * size
    assert sum(map(sum, to)) == sum(counts)


@thorough
@given(starts_of_chunks())
def test_every_row_goes_where_its_place_says(drawn: tuple[int, int, Tensor]) -> None:
    """The exchange played by one process: a row is its batch element and head, and its number among all S."""
    size, share, starts = drawn
    batch, groups, chunks = starts.shape[0], starts.shape[1], 2 * size
    deals = [Deal.of(starts, chunks * share, exchange_of(size, rank)) for rank in range(size)]
    pieces = []
    for rank, deal in enumerate(deals):
        runs = [
            [n for chunk in (rank, chunks - 1 - rank) for n in range(first[chunk], first[chunk + 1])]
            for first in starts.flatten(0, 1).tolist()
        ]
        assert deal.held == max(map(len, runs))
        held = [[(head, n) for n in run] + [None] * (deal.held - len(run)) for head, run in enumerate(runs)]
        flat = [row for rows in zip(*held, strict=True) for row in rows]
        sends = deal.out.way.here
        sent = [flat[i] for i in sends.rows.tolist()]
        assert sum(sends.counts) == len(sent)
        pieces.append([sent[sum(sends.counts[:i]) : sum(sends.counts[: i + 1])] for i in range(size)])
    for rank, deal in enumerate(deals):
        receives = deal.out.way.there
        assert receives.length == batch * groups * 2 * share
        assert [len(pieces[sender][rank]) for sender in range(size)] == list(receives.counts)
        dealt = dict(zip(receives.rows.tolist(), [row for sender in pieces for row in sender[rank]], strict=True))
        expected = [
            (head, n)
            for chunk in (rank, chunks - 1 - rank)
            for n in range(chunk * share, (chunk + 1) * share)
            for head in range(batch * groups)
        ]
        assert [dealt[i] for i in range(len(expected))] == expected
