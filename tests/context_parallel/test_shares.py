"""Who pools, attends to and scatters what of packed documents, of all ranks together: integers, without processes."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lighthouse.lighthouse.packed.packing import Packing
from megatron_lighthouse.lighthouse.packed.rule import Rule
from megatron_lighthouse.lighthouse.packed.shares import Shares
from megatron_lighthouse.sequence.documents import Documents
from megatron_lighthouse.sequence.layout import Layout
from tests.context_parallel.test_documents import row_of, rows_of_ranks

some = settings(deadline=None, derandomize=True, max_examples=20)


@st.composite
def shared(draw: st.DrawFn) -> tuple[Packing, list[Shares]]:
    """A row that ranks share, of documents shorter than a chunk and than a window, and longer."""
    size, (levels, pooling) = draw(st.integers(2, 8)), draw(st.sampled_from([(2, 2), (2, 3), (3, 2), (4, 2)]))
    lengths = draw(st.lists(st.integers(1, 70), min_size=1, max_size=6))
    lengths += [rest for rest in (-sum(lengths) % (2 * size),) if rest]
    rule = Rule(levels, pooling, tile_budget=2, tile_windows=draw(st.sampled_from([4, 8])), whole_below=0)
    packing = Packing.of(row_of(lengths), rule)
    return packing, [Shares(packing, Layout(size, rank)) for rank in range(size)]


@some
@given(shared())
def test_each_token_and_window_has_one_rank(drawn: tuple[Packing, list[Shares]]) -> None:
    packing, ranks = drawn
    pooled = torch.cat([x.cut.token_at[x.cut.owns_token] for x in ranks])
    assert torch.equal(pooled.sort().values, torch.arange(packing.seq_length))
    entries = torch.cat([x.entry_at[x.owns] for x in ranks])
    assert torch.equal(entries.sort().values, torch.arange(packing.pyramid_length))
    for rank, x in enumerate(ranks):
        assert (x.owners[x.entry_at[x.owns]] == rank).all()
        assert torch.equal(x.cut.token_at[x.cut.own_at], rows_of_ranks(row_of(packing.lengths), len(ranks))[rank])
    if sum(packing.windows):
        most = ranks[0].most_windows
        for x in ranks:
            runs = [torch.arange(first, end) + packing.bounds[1][i] for i, first, end in x.own_runs]
            assert torch.equal(torch.cat([x.own_window_at[:0], *runs]), x.own_window_at)
        own = (x.own_window_at for x in ranks)
        padded = [torch.nn.functional.pad(x, (0, most - len(x)), value=-1) for x in own]
        assert torch.equal(torch.cat(padded)[ranks[0].window_places], torch.arange(sum(packing.windows)))


@some
@given(shared())
def test_both_ends_list_the_same_tokens_in_the_same_order(drawn: tuple[Packing, list[Shares]]) -> None:
    packing, ranks = drawn
    held = rows_of_ranks(row_of(packing.lengths), len(ranks))
    sent = [rows[x.align.here.rows].split(x.align.here.counts) for x, rows in zip(ranks, held, strict=True)]
    received = [x.cut.token_at[x.align.there.rows].split(x.align.there.counts) for x in ranks]
    for i, row in enumerate(sent):
        for j, tokens in enumerate(row):
            assert torch.equal(tokens, received[j][i])


@some
@given(shared())
def test_an_entry_is_scattered_wherever_it_spills(drawn: tuple[Packing, list[Shares]]) -> None:
    packing, ranks = drawn
    chunk, (starts, windows, _) = ranks[0].chunk.tolist(), packing.bounds.tolist()
    expected = {(token, chunk[token]) for token in range(packing.seq_length)}
    for i, (start, end) in enumerate(pairwise(starts)):
        for level in range(1, packing.levels):
            width, each = packing.window(level), packing.rule.window // packing.window(level)
            for entry in range(packing.windows[i] * each):
                last = start + (entry + 1) * width - 1
                number = packing.offset(level) + windows[i] * each + entry
                expected |= {(number, chunk[token]) for token in range(last, min(last + width, end))}
    listed = [(e, c) for row in ranks[0].wanted.tolist() for e, c in enumerate(row) if c >= 0]
    assert sorted(listed) == sorted(expected)
    scattered = [pair for x in ranks for pair in zip(x.entry_at[x.wants].tolist(), x.chunks_at[x.wants].tolist(), strict=True)]
    assert sorted(scattered) == sorted(expected)


@some
@given(shared())
def test_tables_ask_the_device_of_the_row_nothing(drawn: tuple[Packing, list[Shares]]) -> None:
    """A row whose boundaries are nowhere has tables of the same shapes: the host knows how much there is."""
    packing, ranks = drawn
    nowhere = Packing.of(Documents(packing.cu_seqlens.to("meta"), packing.lengths), packing.rule)

    def tables(x: Shares) -> dict[str, torch.Tensor]:
        of_pieces = {"unit_table": x.pieces.unit_table, "window_starts": x.pieces.window_starts}
        names = "entry_at owns owners chunks_at wanted wants gathers_at scatters_at row_at own_rows own_windows".split()
        names += "window_places own_inside".split()
        of_pieces["own_at"] = x.cut.own_at
        return of_pieces | {"there": x.align.slots, "here": x.align.back.slots} | {name: getattr(x, name) for name in names}

    for rank, x in enumerate(ranks):
        found = tables(Shares(nowhere, Layout(len(ranks), rank)))
        assert {name: (y.shape, y.dtype) for name, y in found.items()} == {
            name: (y.shape, y.dtype) for name, y in tables(x).items()
        }
        assert all(y.is_meta for y in found.values())
