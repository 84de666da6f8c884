"""Halo: what the last windows of a chunk spill into the next one, across every border of 2C chunks, and its gradient back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lighthouse import LighthouseConfig
from megatron_lighthouse.kernels.lighthouse import edge as edge_kernels
from megatron_lighthouse.lighthouse.selection import Selection
from megatron_lighthouse.lighthouse.sharded import halo
from megatron_lighthouse.lighthouse.steps import Steps
from tests.context_parallel.shards import inputs_of, layer, shard, together
from tests.oracle import Entry, Problem, number
from tests.ranks import SIZES
from tests.steps import DEVICE, both, differentiate, entries, inner_product, poisoned, precision, random_like, selection_of
from tests.tolerances import assert_close

on_sizes = pytest.mark.parametrize("size", SIZES, ids="CP={}".format)

LAYOUTS = {
    "chunks of three windows of 4": (4, Problem(96, 3, 2, 8, 4, batch=1, groups=2, queries_per_group=2)),
    "chunks of one window of 5": (2, Problem(20, 2, 5, 2, 2, batch=2, groups=2, queries_per_group=1)),
    "chunks of two windows of 27": (2, Problem(216, 4, 3, 4, 4, batch=1, groups=1, queries_per_group=2)),
}
by_layout = pytest.mark.parametrize(("size", "problem"), LAYOUTS.values(), ids=LAYOUTS)


@dataclass
class Part:
    """What one rank has of a selection among the whole sequence."""

    selection: Selection
    rows: list[list[list[int]]]
    """By batch element and group: the numbers of its rows among all S, in its own order."""
    before: list[list[list[list[int | None]]]]
    """By batch element, group, chunk and level 1..L-1: the number of the row that ends where the chunk begins, if gathered."""


def part_of(problem: Problem, chosen: list[list[list[Entry]]], size: int, rank: int) -> Part:
    """Cut out of the whole entry by entry: nothing here is the library's but the fields of `Selection`."""
    own = replace(problem, seq_length=problem.seq_length // size)
    length = problem.seq_length // (2 * size)
    chunks = rank, 2 * size - 1 - rank
    rows: list[list[list[int]]] = []
    before: list[list[list[list[int | None]]]] = []
    for groups in chosen:
        rows.append([])
        before.append([])
        for entries_of_group in groups:
            chunk_of = [i * problem.pooling**level // length for level, i in entries_of_group]
            rows[-1].append([row for chunk in chunks for row, held in enumerate(chunk_of) if held == chunk])
            at = {entry: row for row, entry in enumerate(entries_of_group)}
            levels = range(1, problem.levels)
            ends = [[(level, chunk * length // problem.pooling**level - 1) for level in levels] for chunk in chunks]
            before[-1].append([[at.get(entry) for entry in chunk_ends] for chunk_ends in ends])
    whole = selection_of(problem, chosen).geometry
    places = torch.full((problem.batch, problem.groups, sum(own.seq_length // own.pooling**l for l in range(own.levels))), -1)
    for b, groups in enumerate(chosen):
        for g, entries_of_group in enumerate(groups):
            for place, row in enumerate(rows[b][g]):
                level, i = entries_of_group[row]
                chunk, within = divmod(i, length // problem.pooling**level)
                moved = within + chunks.index(chunk) * (length // problem.pooling**level)
                places[b, g, number((level, moved), own)] = place
    held = max(len(x) for groups in rows for x in groups)
    pyramid = replace(whole, seq_length=own.seq_length)
    return Part(Selection(pyramid, places.int().to(DEVICE), held, chunks=2), rows, before)


def cut(part: Part, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of all rows [S, B, H, D]: those of a rank, NaN where it has none, and its halo [2, L-1, B, H, D]."""
    ratio = rows.shape[2] // len(part.rows[0])
    levels = len(part.before[0][0][0])
    own = rows.new_full((part.selection.length, *rows.shape[1:]), float("nan"))
    halo = rows.new_zeros(2, levels, *rows.shape[1:])
    for b, groups in enumerate(part.rows):
        for g, numbers in enumerate(groups):
            heads = slice(g * ratio, (g + 1) * ratio)
            own[: len(numbers), b, heads] = rows[numbers, b, heads]
            for chunk, ends in enumerate(part.before[b][g]):
                for level, row in enumerate(ends):
                    if row is not None:
                        halo[chunk, level, b, heads] = rows[row, b, heads]
    return own, halo


def paste(part: Part, total: Tensor, own: Tensor, halo: Tensor) -> None:
    """Add the gradients of what `cut` gives to those of all rows."""
    ratio = total.shape[2] // len(part.rows[0])
    for b, groups in enumerate(part.rows):
        for g, numbers in enumerate(groups):
            heads = slice(g * ratio, (g + 1) * ratio)
            total[numbers, b, heads] += own[: len(numbers), b, heads]
            for chunk, ends in enumerate(part.before[b][g]):
                for level, row in enumerate(ends):
                    if row is not None:
                        total[row, b, heads] += halo[chunk, level, b, heads]


def rows_for(problem: Problem, dtype: str) -> Tensor:
    length = len(entries(problem)[0][0])
    shape = length, problem.batch, problem.groups * problem.queries_per_group, 3
    generator = torch.Generator().manual_seed(7)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, getattr(torch, dtype))


@both
@by_layout
def test_chunks_with_a_halo_scatter_as_the_whole_does(steps: Steps, size: int, problem: Problem) -> None:
    rows, chosen = rows_for(problem, precision(steps)), entries(problem)
    expected = steps.scatter(rows, selection_of(problem, chosen))
    for rank in range(size):
        part = part_of(problem, chosen, size, rank)
        own, before = cut(part, rows)
        with poisoned():
            out = steps.scatter(own, part.selection, before)
        assert torch.equal(out, shard(expected, size, rank))


@both
@by_layout
def test_gradients_of_rows_and_halo_make_those_of_the_whole(steps: Steps, size: int, problem: Problem) -> None:
    rows, chosen = rows_for(problem, precision(steps)), entries(problem)
    selection = selection_of(problem, chosen)
    (grad,) = random_like([steps.scatter(rows, selection)])
    (expected,) = differentiate(lambda x: steps.scatter(x, selection), [rows], [grad])
    total = torch.zeros_like(expected)
    for rank in range(size):
        part = part_of(problem, chosen, size, rank)
        own, before = cut(part, rows)

        def scatter(own: Tensor, before: Tensor, part: Part = part) -> Tensor:
            return steps.scatter(own, part.selection, before)

        with poisoned():
            back = differentiate(scatter, [own, before], [shard(grad, size, rank)])
        paste(part, total, *back)
    assert_close(total, expected, precision(steps))


@both
@by_layout
def test_the_halo_is_not_read_before_it_arrives(steps: Steps, size: int, problem: Problem) -> None:
    """It may still be under way when the scatter begins: whoever reads it has waited for it."""
    rows, chosen = rows_for(problem, precision(steps)), entries(problem)
    part = part_of(problem, chosen, size, 0)
    own, there = cut(part, rows)
    coming = torch.full_like(there, float("nan"))
    travel: Any = SimpleNamespace(arrive=lambda: coming.copy_(there))
    assert torch.equal(steps.scatter(own, part.selection, coming, travel), steps.scatter(own, part.selection, there))


@both
def test_without_a_halo_a_chunk_drops_what_others_spill(steps: Steps) -> None:
    size, problem = LAYOUTS["chunks of three windows of 4"]
    rows, chosen = rows_for(problem, precision(steps)), entries(problem)
    part = part_of(problem, chosen, size, 1)
    own, before = cut(part, rows)
    assert torch.equal(steps.scatter(own, part.selection), steps.scatter(own, part.selection, torch.zeros_like(before)))


@both
def test_scatter_with_a_halo_repeats_to_the_bit_in_half_precision(steps: Steps) -> None:
    """The receiver adds the rows in fp32 and rounds once, as one rank does."""
    size, problem = LAYOUTS["chunks of three windows of 4"]
    rows, chosen = rows_for(problem, "float16"), entries(problem)
    expected = steps.scatter(rows, selection_of(problem, chosen))
    for rank in range(size):
        part = part_of(problem, chosen, size, rank)
        own, before = cut(part, rows)
        assert torch.equal(steps.scatter(own, part.selection, before), shard(expected, size, rank))


@pytest.mark.parametrize("module", [halo, edge_kernels], ids=["torch", "kernels"])
@by_layout
def test_the_edge_of_a_chunk_is_the_rows_that_end_with_it(module: Any, size: int, problem: Problem) -> None:
    rows, chosen = rows_for(problem, "float32"), entries(problem)
    for rank in range(size):
        part = part_of(problem, chosen, size, rank)
        own, _ = cut(part, rows)
        expected = torch.zeros(2, problem.levels - 1, *rows.shape[1:])
        for b, groups in enumerate(chosen):
            for head in range(rows.shape[2]):
                entries_of_head = groups[head // problem.queries_per_group]
                for i, chunk in enumerate((rank, 2 * size - 1 - rank)):
                    for level in range(1, problem.levels):
                        last = (chunk + 1) * problem.seq_length // (2 * size) // problem.pooling**level - 1
                        if (level, last) in entries_of_head:
                            expected[i, level - 1, b, head] = rows[entries_of_head.index((level, last)), b, head]
        given = (part.selection.places, part.selection.sizes) if module is edge_kernels else (part.selection,)
        with poisoned():
            assert torch.equal(module.edge(own, *given).cpu(), expected)
        (grads,) = random_like([expected.to(DEVICE)])
        total = torch.zeros_like(own)
        module.add_edge(total, grads, *given)
        adjoint = inner_product([total], [own.nan_to_num()]), inner_product([expected.to(DEVICE)], [grads])
        assert_close(*adjoint, "adjoint float32")


TILES = {"a tile in each chunk": 2, "one tile": 32}
by_tiles = pytest.mark.parametrize("tile_budget", TILES.values(), ids=TILES)
SPILLING = Problem(256, 3, 2, 32, 2)


@on_sizes
@by_tiles
def test_the_spill_across_every_border_arrives_and_its_gradient_returns(size: int, tile_budget: int) -> None:
    """Batch element b has queries in the last window of chunk b alone, and gradients where that spills into chunk b + 1."""
    borders, window = 2 * size - 1, SPILLING.window
    problem = replace(SPILLING, tile_budget=tile_budget, batch=borders)
    config = LighthouseConfig(**problem.options)  # type: ignore[arg-type]
    inputs = inputs_of(problem)
    query, _, _, grad = inputs
    last, spilled = torch.zeros_like(query), torch.zeros_like(query)
    for b in range(borders):
        border = (b + 1) * problem.seq_length // (2 * size)
        last[border - window : border, b] = 1
        spilled[border : border + window - 1, b] = 1
    query *= last
    grad *= spilled
    out, dq, *_ = together(size, layer, inputs, config, "p2p", "contiguous", True)
    expected, expected_dq, *_ = layer(None, inputs, config, identity=True)
    assert torch.equal(out, expected)
    assert_close(dq, expected_dq, "float64")
    for b in range(borders):
        assert (out[:, b] * spilled[:, b]).any(-1).sum() == window - 1  # every position that it spills to
        assert (dq[:, b] * last[:, b]).any(-1).sum() == window


@on_sizes
@by_tiles
def test_the_layer_without_its_attention_is_linear_and_backward_its_adjoint(size: int, tile_budget: int) -> None:
    """<layer(x), y> = <x, backward(y)>, over all ranks: what crosses between them goes back the way it came."""
    problem = replace(SPILLING, tile_budget=tile_budget, batch=2, groups=2, queries_per_group=2)
    inputs = inputs_of(problem)
    config = LighthouseConfig(**problem.options)  # type: ignore[arg-type]
    out, dq, *_ = together(size, layer, inputs, config, "p2p", "contiguous", True)
    assert_close((out * inputs[3]).sum(), (dq * inputs[0]).sum(), "adjoint float64")


@on_sizes
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_without_the_attention_outputs_are_those_of_one_rank_to_the_bit(dtype: str, size: int) -> None:
    problem = replace(SPILLING, tile_budget=32, batch=2, groups=2, queries_per_group=2)
    inputs, config = inputs_of(problem, dtype), LighthouseConfig(**problem.options)  # type: ignore[arg-type]
    out, dq, *_ = together(size, layer, inputs, config, "p2p", "contiguous", True)
    expected, expected_dq, *_ = layer(None, inputs, config, identity=True)
    assert torch.equal(out, expected)
    assert_close(dq, expected_dq, dtype)
