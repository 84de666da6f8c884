"""A layer on several ranks against the same layer on one: selection, output and gradients; and dense attention over shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_lighthouse import LighthouseConfig, lighthouse_attention
from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.context_parallel.schemes import COMM_TYPES
from megatron_lighthouse.lighthouse.rotary import Rotary
from megatron_lighthouse.lighthouse.scorers import SCORERS
from megatron_lighthouse.softmax.backends import inner_attention
from megatron_lighthouse.softmax.sharded import sharded_attention
from tests.context_parallel.shards import Group, deep, dense, inputs_of, layer, shards_of, together
from tests.oracle import Problem
from tests.ranks import SIZES, run_ranks
from tests.steps import LAYOUTS
from tests.tolerances import assert_close

few = settings(derandomize=True, max_examples=15)
on_sizes = pytest.mark.parametrize("size", SIZES, ids="CP={}".format)
on_few = pytest.mark.parametrize("size", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 8))], ids="CP={}".format)
"""What 2 and 8 ranks do otherwise than 4, `test_ranks_equal_one` holds."""
by_comm_type = pytest.mark.parametrize("comm_type", COMM_TYPES)

PROBLEMS = {
    "a tile in each chunk": Problem(256, 3, 2, 32, 2),
    "two tiles in each chunk of CP=4": Problem(128, 2, 2, 32, 2, pin_first=False),
    "one tile": Problem(256, 3, 2, 16, 16),
    "one tile, nothing pinned": Problem(256, 2, 4, 16, 16, pin_first=False),
    "tiles that begin within chunks": Problem(192, 3, 2, 24, 8),
    "tiles of two chunks of CP=8, four levels": Problem(256, 4, 2, 16, 2),
    "chunks of two windows of 27": Problem(864, 4, 3, 16, 16),
    "chunks of one window, all refined": Problem(256, 3, 4, 16, 8),
}

BY_ALL = ["a tile in each chunk", "one tile", "tiles that begin within chunks"]
"""Problems that are tried with every scheme; the others with one each."""
OTHERS = list(zip([name for name in PROBLEMS if name not in BY_ALL], cycle(COMM_TYPES), strict=False))


def config_of(problem: Problem, scorer: str = "norm") -> LighthouseConfig:
    return LighthouseConfig(**problem.options, scorer=scorer)  # type: ignore[arg-type]


def grouped(problem: Problem, comm_type: str, size: int) -> Problem:
    """Two batch elements, and grouped queries: as many groups as all-to-all shares out, else two."""
    return replace(problem, batch=2, groups=max(4, size) if comm_type == "a2a" else 2, queries_per_group=2)


def equals_one_rank(
    size: int,
    problem: Problem,
    comm_type: str,
    dtype: str = "float64",
    scorer: str = "norm",
    strides: str = "contiguous",
    scale: float | None = None,
    steps: str = "reference",
    rotary: Rotary | None = None,
) -> None:
    inputs, config = inputs_of(problem, dtype), config_of(problem, scorer).replace(steps=steps)
    *actual, entries = together(size, layer, inputs, config, comm_type, strides, False, scale, rotary)
    *expected, expected_entries = layer(None, inputs, config, scale=scale, rotary=rotary)
    assert torch.equal(entries, expected_entries)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert_close(a, b, dtype if dtype == "bfloat16" else f"ranks {dtype}")


ROTARY = {"halves": Rotary(torch.tensor([1.0, 0.3])), "neighbours": Rotary(torch.tensor([0.7, 0.2]), True, 2)}


@on_few
@pytest.mark.parametrize("name", BY_ALL)
@pytest.mark.parametrize("pairs", ROTARY)
@pytest.mark.parametrize("scorer", ["norm", "summary"])
def test_ranks_equal_one_where_rows_are_turned(scorer: str, pairs: str, name: str, size: int) -> None:
    """Rows stand at their window's last token, whichever rank pools them; summary attends among such."""
    comm_type = COMM_TYPES[BY_ALL.index(name) % len(COMM_TYPES)]
    problem = replace(grouped(PROBLEMS[name], comm_type, size), dim=8)
    equals_one_rank(size, problem, comm_type, scorer=scorer, rotary=ROTARY[pairs])


@pytest.mark.parametrize("name", ["a tile in each chunk", "one tile"])
def test_ranks_equal_one_where_rows_are_turned_in_fp32(name: str) -> None:
    equals_one_rank(4, replace(grouped(PROBLEMS[name], "p2p", 4), dim=8), "p2p", "float32", rotary=ROTARY["halves"])


@on_sizes
@by_comm_type
@pytest.mark.parametrize("name", BY_ALL)
def test_ranks_equal_one(name: str, comm_type: str, size: int) -> None:
    equals_one_rank(size, grouped(PROBLEMS[name], comm_type, size), comm_type)


@on_few
@pytest.mark.parametrize(("name", "comm_type"), OTHERS)
def test_ranks_equal_one_in_other_layouts(name: str, comm_type: str, size: int) -> None:
    equals_one_rank(size, grouped(PROBLEMS[name], comm_type, size), comm_type)


@on_few
@by_comm_type
@pytest.mark.parametrize("name", ["a tile in each chunk", "tiles that begin within chunks"])
def test_ranks_equal_one_in_fp32(name: str, comm_type: str, size: int) -> None:
    equals_one_rank(size, grouped(PROBLEMS[name], comm_type, size), comm_type, "float32")


@pytest.mark.parametrize("tile_budget", [2, 8], ids=["a tile in each chunk", "one tile"])
def test_the_kernels_on_ranks_equal_those_on_one(tile_budget: int) -> None:
    """With all that travels while they run."""
    problem = Problem(64, 3, 2, 8, tile_budget, groups=1, queries_per_group=2, dim=4)
    equals_one_rank(2, problem, "p2p", "float32", steps="kernels")


@by_comm_type
@pytest.mark.parametrize("size", [2, 4], ids="CP={}".format)
def test_ranks_are_near_one_in_bf16(size: int, comm_type: str) -> None:
    equals_one_rank(size, grouped(PROBLEMS["one tile"], comm_type, size), comm_type, "bfloat16")


@by_comm_type
@pytest.mark.parametrize("name", ["a tile in each chunk", "one tile"])
@pytest.mark.parametrize("strides", LAYOUTS[1:])
def test_ranks_take_any_strides(strides: str, name: str, comm_type: str) -> None:
    equals_one_rank(4, grouped(PROBLEMS[name], comm_type, 4), comm_type, strides=strides)


@by_comm_type
def test_ranks_take_a_scale(comm_type: str) -> None:
    equals_one_rank(2, grouped(PROBLEMS["one tile"], comm_type, 2), comm_type, scale=0.3)


@on_few
@pytest.mark.parametrize("name", ["a tile in each chunk", "tiles that begin within chunks"])
@pytest.mark.parametrize("scorer", SCORERS)
def test_every_scorer_ranks_alike(scorer: str, name: str, size: int) -> None:
    equals_one_rank(size, grouped(PROBLEMS[name], "p2p", size), "p2p", scorer=scorer, scale=0.9)


@on_few
@pytest.mark.parametrize("pin_first", [True, False], ids=["pinned", "not pinned"])
@pytest.mark.parametrize("name", ["a tile in each chunk", "one tile"])
def test_the_first_window_alone_is_pinned(name: str, pin_first: bool, size: int) -> None:
    problem = replace(PROBLEMS[name], pin_first=pin_first)
    inputs = inputs_of(problem)
    for chunk in zip(*(x.chunk(2 * size) for x in inputs[:2]), strict=True):
        for x in chunk:
            x[: problem.window] *= 1e-3  # by its norms the first window of a chunk would lose at every level
    *actual, entries = together(size, layer, inputs, config_of(problem))
    *expected, expected_entries = layer(None, inputs, config_of(problem))
    assert torch.equal(entries, expected_entries)
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, "ranks float64")
    empty = (actual[0] == 0).all(-1).all(-1).all(-1).nonzero().flatten().tolist()
    assert empty == ([] if pin_first else list(range(problem.window - 1)))


def _fitting(size: int) -> list[Problem]:
    """Small problems that keep every rule on `size` ranks."""
    fitting = []
    for levels, pooling in ((2, 2), (2, 3), (2, 4), (3, 2), (3, 3), (4, 2)):
        for windows in (2 * size, 4 * size, 6 * size):
            for tiles in range(1, windows // 2 + 1):
                for tile_budget in (2, 4, 8):
                    problem = Problem(windows * pooling ** (levels - 1), levels, pooling, tiles * tile_budget, tile_budget)
                    try:
                        config_of(problem).geometry(problem.seq_length, size)
                    except ValueError:
                        continue
                    fitting.append(problem)
    return fitting


FITTING = {size: _fitting(size) for size in (2, 4)}


@few
@given(data=st.data())
@pytest.mark.parametrize("size", FITTING, ids="CP={}".format)
def test_any_layout_equals_one_rank(size: int, data: st.DataObject) -> None:
    problem = replace(
        data.draw(st.sampled_from(FITTING[size]), label="sizes"),
        pin_first=data.draw(st.booleans(), label="pin_first"),
        batch=data.draw(st.integers(1, 2), label="batch"),
        groups=data.draw(st.sampled_from([size, 2 * size]), label="groups"),
        queries_per_group=data.draw(st.integers(1, 3), label="queries per group"),
        dim=data.draw(st.sampled_from([1, 3, 8]), label="dim"),
        ties=data.draw(st.booleans(), label="ties"),
        seed=data.draw(st.integers(0, 2**20), label="seed"),
    )
    comm_type, strides = (data.draw(st.sampled_from(x)) for x in (COMM_TYPES, LAYOUTS))
    equals_one_rank(size, problem, comm_type, strides=strides)


@pytest.mark.parametrize(
    ("name", "comm_type"),
    [
        *(("a tile in each chunk", comm_type) for comm_type in COMM_TYPES),
        ("one tile", "p2p"),
        *(pytest.param("one tile", comm_type, marks=pytest.mark.slow) for comm_type in COMM_TYPES if comm_type != "p2p"),
    ],
)
@pytest.mark.parametrize(
    "how", ["once", "backward twice", "recomputed", "recomputed, the old way", "without a gradient of the keys"]
)
def test_layers_on_each_other_train_as_on_one_rank(how: str, comm_type: str, name: str) -> None:
    inputs, config = inputs_of(grouped(PROBLEMS[name], comm_type, 4)), config_of(PROBLEMS[name])
    actual = together(4, deep, inputs, config, comm_type, how)
    for a, b in zip(actual, deep(None, inputs, config, comm_type, how), strict=True):
        assert_close(a, b, "ranks float64")


def _dense_by_torch(inputs: Sequence[Tensor], scale: float | None) -> list[Tensor]:
    """Output and gradients of one rank, by torch's own attention."""
    *leaves, grad = (x.clone().requires_grad_() for x in inputs)
    query, key, value = (x.permute(1, 2, 0, 3) for x in leaves)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    out = sdpa(query, key, value, is_causal=True, scale=scale, enable_gqa=True).permute(2, 0, 1, 3)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@on_sizes
@by_comm_type
@pytest.mark.parametrize("scale", [None, 0.3], ids="scale={}".format)
def test_dense_attention_over_shards_equals_attention_over_the_whole(scale: float | None, comm_type: str, size: int) -> None:
    inputs = inputs_of(grouped(Problem(6 * size, 2, 2, 2, 2), comm_type, size))
    for a, b in zip(together(size, dense, inputs, comm_type, scale), _dense_by_torch(inputs, scale), strict=True):
        assert_close(a, b, "ranks float64")


@pytest.mark.parametrize("comm_type", ["p2p", "all_gather"])
def test_what_is_made_of_many_parts_is_rounded_once(comm_type: str) -> None:
    """Parts of eight ranks are merged and summed in fp32: in bf16 each would add the error of another rounding."""
    inputs = inputs_of(Problem(1024, 2, 2, 2, 2, groups=2, queries_per_group=2, dim=64), "bfloat16")
    exact = _dense_by_torch([x.double() for x in inputs], None)
    for found, expected in zip(together(8, dense, inputs, comm_type, None), exact, strict=True):
        rounded = expected.bfloat16().double()
        mean, once = ((x - expected).abs().mean() for x in (found.double(), rounded))
        assert_close(mean / once, 1.0, "roundings")


def _used_twice(group: Group, inputs: Sequence[Tensor], config: LighthouseConfig) -> list[Tensor]:
    """Gradients by one ring that first serves a layer, which calls its `set_out`, and then attends on its own."""
    query, key, value, grad = (x.requires_grad_() for x in shards_of(group, inputs))
    exchange = Exchange.over(group)
    if exchange is None:
        attend = inner_attention("sdpa", query, key)
        return list(torch.autograd.grad(attend(query, key, value), (query, key, value), grad))
    attend = sharded_attention("auto", query, key, exchange, "p2p")
    lighthouse_attention(query, key, value, config, cp_group=group, attend=attend).backward(grad)
    return list(torch.autograd.grad(attend(query, key, value), (query, key, value), grad))


def test_one_ring_serves_layers_and_rows() -> None:
    inputs, config = inputs_of(PROBLEMS["a tile in each chunk"]), config_of(PROBLEMS["a tile in each chunk"])
    for a, b in zip(together(2, _used_twice, inputs, config), _used_twice(None, inputs, config), strict=True):
        assert_close(a, b, "ranks float64")


def looked_at(group: Group, inputs: Sequence[Tensor], config: LighthouseConfig, looks: int) -> list[Tensor]:
    """Gradients of a rank's shard, after the gradient of its output alone was asked for so many times."""
    *leaves, grad = (x.clone().requires_grad_() for x in shards_of(group, inputs))
    out = lighthouse_attention(*leaves, config, cp_group=group)
    loss = (out * grad).sum()
    for _ in range(looks):
        assert torch.equal(*torch.autograd.grad(loss, out, retain_graph=True), grad)
    return list(torch.autograd.grad(loss, leaves))


def test_the_gradient_of_the_output_can_be_asked_for() -> None:
    """Nothing sets out for it that nobody would then receive."""
    problem = grouped(PROBLEMS["a tile in each chunk"], "p2p", 2)
    plain, after_looks = (run_ranks(2, looked_at, inputs_of(problem), config_of(problem), looks) for looks in (0, 2))
    for expected, found in zip(plain, after_looks, strict=True):
        assert all(map(torch.equal, expected, found))
