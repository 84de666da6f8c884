"""Selection: which entries, in which order, and the inverse map."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from megatron_lighthouse import LighthouseConfig, lighthouse_select
from megatron_lighthouse.kernels import lighthouse as kernels
from megatron_lighthouse.lighthouse import reference
from megatron_lighthouse.lighthouse.geometry import Geometry
from megatron_lighthouse.lighthouse.selection import Selection
from megatron_lighthouse.lighthouse.steps import Steps
from tests.oracle import Problem, attention, entry_at, last_token, number, order, problems
from tests.oracle import select as select_entries
from tests.steps import DEVICE, both, chosen, poisoned, tensors

thorough = settings(derandomize=True, max_examples=150)


def selection_of(problem: Problem) -> Selection:
    query, key, _ = tensors(problem)
    return chosen(query, key, LighthouseConfig(**problem.options))


def refined(
    steps: Steps, scores_q: Sequence[float], scores_k: Sequence[float], tile_budget: int = 2, pin_first: bool = False
) -> list[int]:
    """The windows of two tokens that one tile refines, by the windows' scores."""
    geometry = Geometry(2 * len(scores_q), 2, 2, tile_budget, tile_budget)
    scores = torch.tensor([scores_q, scores_k], dtype=torch.float32, device=DEVICE).view(2, 1, 1, -1)
    tokens = (steps.select(scores, geometry, pin_first).rows[0][0, 0] >= 0).nonzero().flatten()
    return tokens[::2].floor_divide(2).tolist()


def places_by_hand(scores: Tensor, problem: Problem) -> list[list[list[int]]]:
    """The rows of all entries, from level-0 scores [2, B, G, N], by the loops of the oracle."""
    length, found = LighthouseConfig(**problem.options).geometry(problem.seq_length).pyramid_length, []
    for b in range(problem.batch):
        found.append([[-1] * length for _ in range(problem.groups)])
        for g in range(problem.groups):
            by_query, by_key = scores[:, b, g].tolist()
            for row, entry in enumerate(order(select_entries(by_query, by_key, problem), problem)):
                found[b][g][number(entry, problem)] = row
    return found


def level_scores(problem: Problem) -> tuple[Tensor, Tensor]:
    """Random level-0 scores [2, B, G, N] with many ties, and the maxima that the steps take."""
    generator = torch.Generator().manual_seed(problem.seed)
    scores = torch.randint(0, 6, (2, problem.batch, problem.groups, problem.seq_length), generator=generator).float() / 3
    widths = [problem.pooling**level for level in range(1, problem.levels)]
    return scores, torch.cat([scores.unflatten(-1, (-1, width)).amax(-1) for width in widths], -1).to(DEVICE)


@pytest.mark.parametrize(
    ("steps", "block"),
    [(reference, 4096), (kernels, 4096), (kernels, 8)],
    ids=["reference", "kernels, one block a tile", "kernels, many blocks a tile"],
)
@settings(derandomize=True, max_examples=12)
@given(problem=problems())
def test_places_are_those_of_the_oracle(steps: Steps, block: int, problem: Problem) -> None:
    scores, coarse = level_scores(problem)
    geometry = LighthouseConfig(**problem.options).geometry(problem.seq_length)
    module = importlib.import_module("megatron_lighthouse.kernels.lighthouse.select")
    with mock.patch.object(module, "BLOCK", block), poisoned():
        selection = steps.select(coarse, geometry, problem.pin_first)
    assert selection.places.dtype == torch.int32
    assert selection.places.tolist() == places_by_hand(scores, problem)


@both
def test_scores_of_every_size_are_ranked(steps: Steps) -> None:
    """Bit patterns from the smallest to the largest float, zero and infinity too."""
    values = [0.0, 1e-45, 1e-38, 1.0, 1.0000001, 3.4028234e38, float("inf"), 2.0]
    geometry = Geometry(16, 2, 2, 4, 4)
    scores = torch.tensor([values, values[::-1]], device=DEVICE).view(2, 1, 1, -1)
    tokens = (steps.select(scores, geometry, False).rows[0][0, 0] >= 0).nonzero().flatten()
    # of s^Q the two highest are windows 6 and 5; of s^K, the rest's highest, 1 and 2
    assert tokens[::2].floor_divide(2).tolist() == [1, 2, 5, 6]


@thorough
@given(problems())
def test_entries_are_unique_and_in_causal_order(problem: Problem) -> None:
    selection = selection_of(problem)
    length = LighthouseConfig(**problem.options).geometry(problem.seq_length).gathered_length
    assert selection.indices.shape == (problem.batch, problem.groups, length)
    for indices in selection.indices.flatten(0, 1).tolist():
        keys = [(last_token(entry, problem), entry[0]) for entry in (entry_at(i, problem) for i in indices)]
        assert all(a < b for a, b in pairwise(keys))  # strictly: so unique too


@thorough
@given(problems())
def test_all_coarsest_and_the_children_of_m_entries_per_tile(problem: Problem) -> None:
    top, per_tile = problem.levels - 1, problem.seq_length * problem.tile_budget // problem.budget
    for indices in selection_of(problem).indices.flatten(0, 1).tolist():
        gathered = {entry_at(i, problem) for i in indices}
        assert {i for level, i in gathered if level == top} == set(range(problem.seq_length // problem.window))
        for level in range(top):
            children = {i for finer, i in gathered if finer == level}
            parents = {i // problem.pooling for i in children}
            assert children == {i * problem.pooling + c for i in parents for c in range(problem.pooling)}
            assert all((level + 1, i) in gathered for i in parents)
            tile = [i * problem.pooling ** (level + 1) // per_tile for i in parents]
            assert np.bincount(tile).tolist() == [problem.tile_budget] * (problem.budget // problem.tile_budget)


@thorough
@given(problems())
def test_a_budget_of_all_windows_gathers_every_token(problem: Problem) -> None:
    tiles = problem.budget // problem.tile_budget
    problem = replace(problem, levels=2, seq_length=tiles * problem.tile_budget * problem.pooling)
    indices = selection_of(problem).indices
    everything = torch.arange(problem.seq_length + problem.budget)
    assert torch.equal(indices.sort(-1).values, everything.expand_as(indices))


@thorough
@given(problems())
def test_rows_are_the_inverse_of_indices(problem: Problem) -> None:
    selection = selection_of(problem)
    by_entry = torch.cat(selection.rows, -1)
    for places, indices in zip(by_entry.flatten(0, 1).tolist(), selection.indices.flatten(0, 1).tolist(), strict=True):
        expected = {entry: row for row, entry in enumerate(indices)}
        assert places == [expected.get(entry, -1) for entry in range(len(places))]
    lengths = [problem.seq_length // problem.pooling**level for level in range(problem.levels)]
    assert [rows.shape[-1] for rows in selection.rows] == lengths


@thorough
@given(problems(ties=True))
def test_same_again(problem: Problem) -> None:
    first, second = selection_of(problem), selection_of(problem)
    assert torch.equal(first.indices, second.indices)
    assert all(map(torch.equal, first.rows, second.rows))


@thorough
@given(problems())
def test_lighthouse_select_gives_the_entries_of_the_oracle(problem: Problem) -> None:
    query, key, _ = tensors(problem)
    indices = lighthouse_select(query.requires_grad_(), key, LighthouseConfig(**problem.options))
    assert indices.dtype == torch.int64
    assert not indices.requires_grad
    np.testing.assert_array_equal(indices.numpy(), attention(*problem.arrays(), problem)[0])


@both
def test_ties_go_to_the_lower_index(steps: Steps) -> None:
    assert refined(steps, [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], tile_budget=4) == [0, 1, 2, 3]
    assert refined(steps, [0, 0, 5, 5, 5, 0], [0, 0, 0, 7, 7, 7]) == [2, 3]


@both
@pytest.mark.parametrize("sign", [1, -1])
def test_nan_of_either_sign_is_the_highest(sign: int, steps: Steps) -> None:
    """A model that has diverged selects something, whatever sign its machine gives to NaN."""
    nan = math.copysign(math.nan, sign)
    assert torch.tensor(nan).signbit() == (sign < 0)
    assert refined(steps, [1, 9, nan, 2, 0, 0], [5, 6, nan, nan, 7, 0]) == [2, 3]


@both
def test_queries_choose_before_keys(steps: Steps) -> None:
    # window 1 leads both lists: the queries take it, and the keys their next best
    assert refined(steps, [0, 9, 0, 0], [0, 9, 5, 7]) == [1, 3]
    assert refined(steps, [0, 9, 5, 7], [0, 9, 0, 0]) == [0, 1]


@both
def test_pinning_spends_one_of_the_queries_places(steps: Steps) -> None:
    assert refined(steps, [0, 9, 8, 0, 0, 0], [0, 0, 0, 0, 7, 6], tile_budget=4) == [1, 2, 4, 5]
    assert refined(steps, [0, 9, 8, 0, 0, 0], [0, 0, 0, 0, 7, 6], tile_budget=4, pin_first=True) == [0, 1, 4, 5]


def test_group_scores_are_the_norm_of_all_its_query_heads() -> None:
    query = torch.ones(8, 1, 4, 1, dtype=torch.float64)  # two groups of two heads, one dimension
    query[2, 0, :2, 0] = torch.tensor([3.0, 3.0])  # norm 4.24: more than 4.12, though either maximum is less than 4
    query[4, 0, :2, 0] = torch.tensor([1.0, 4.0])
    query[6, 0, 2:, 0] = torch.tensor([1.0, 2.0])
    key = torch.ones(8, 1, 2, 1, dtype=torch.float64)
    selected = chosen(query, key, LighthouseConfig(2, 2, 2, 2, pin_first=False))
    # the queries' choice, then the lowest of equal keys
    assert (selected.rows[0][0, 0] >= 0).nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert (selected.rows[0][0, 1] >= 0).nonzero().flatten().tolist() == [0, 1, 6, 7]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_norms_beyond_the_dtype_are_ranked(dtype: torch.dtype) -> None:
    # every norm is above fp16's largest number: in fp16 all would tie at infinity, in bf16 most by rounding
    problem = Problem(96, 3, 2, 8, 4, pin_first=False, dim=16, queries_per_group=2)
    shapes = [x.shape for x in problem.arrays()[:2]]
    generator = torch.Generator().manual_seed(1)
    query, key = [(40000 + 25000 * torch.rand(shape, generator=generator)).to(dtype) for shape in shapes]
    indices = lighthouse_select(query, key, LighthouseConfig(**problem.options))
    wide = [x.double().numpy() for x in (query, key, key)]
    np.testing.assert_array_equal(indices.numpy(), attention(*wide, problem)[0])


@pytest.mark.slow
def test_a_tile_of_two_million_windows() -> None:
    """Counts that need more bits than the kernel gives each of the three that it makes at a time."""
    module = importlib.import_module("megatron_lighthouse.kernels.lighthouse.select")
    geometry = Geometry(2**22, 2, 2, 128, 128)
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(2, 1, 1, geometry.coarse_length, generator=generator).to(DEVICE)
    ranks = torch.empty(1, 1, geometry.coarse_length, dtype=torch.int32, device=DEVICE)
    sizes = {"P": 2, "L": 2, "TILES": 1, "TILE_BUDGET": 128, "PIN_FIRST": False, "ONE": False}
    block = module.BLOCK if DEVICE == "cuda" else 2**18  # few and long blocks are quick to interpret
    module.refine_kernel[(1, 1)](scores, ranks, geometry.seq_length, geometry.coarse_length, **sizes, BLOCK=block)
    refined = (ranks[0, 0] % 2).nonzero().flatten()
    by_query = scores[0, 0, 0].topk(64).indices
    by_key = scores[1, 0, 0].index_fill(0, by_query, -1.0).topk(64).indices
    assert torch.equal(refined, torch.cat([by_query, by_key]).sort().values)
