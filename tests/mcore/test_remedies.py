"""Each remedy that a refusal offers is taken: no second rule refuses it, of lengths, budgets, ranks, batches and scorers."""

from __future__ import annotations

from argparse import Namespace
from functools import cache

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_lighthouse.launch.check import parse, settled
from megatron_lighthouse.launch.layout import layout
from megatron_lighthouse.mcore.command_line import before
from megatron_lighthouse.mcore.command_line.arguments import attention_problems, config_of
from tests.mcore.test_launch_check import LLAMA
from tests.test_config import advice

OURS = ("levels", "pooling", "budget", "tile_budget", "edge_budget")


@cache
def base() -> dict[str, object]:
    args = parse([*LLAMA, "--tensor-model-parallel-size", "1", "--context-parallel-size", "1"])
    return vars(args) | {"lighthouse_budget": None, "global_batch_size": None}


def problems(changes: dict[str, object]) -> list[str]:
    """Of a run on nodes of eight GPUs."""
    given = base() | changes
    nodes = given.pop("nodes")
    args = settled(Namespace(**given, world_size=8 * nodes))
    found = [*layout(args, nodes, 8), *before.problems(args), *attention_problems(args, config_of(args), False, False)]
    return [*dict.fromkeys(found)]


@st.composite
def runs(draw: st.DrawFn) -> dict[str, object]:
    """Sizes of which often one does not fit."""
    length = draw(st.sampled_from([2**15, 2**16, 98304, 2**17])) + draw(st.sampled_from([0, 0, 0, 16, 256, -512, 3, 4096]))
    tile = draw(st.sampled_from([None, None, 128, 64, 96, 5]))
    return {
        "seq_length": length,
        "max_position_embeddings": length * draw(st.sampled_from([1, 1, 2])),
        "nodes": draw(st.sampled_from([1, 2, 3, 8])),
        "global_batch_size": draw(st.sampled_from([None, 8, 16, 24])),
        "tensor_model_parallel_size": draw(st.sampled_from([1, 2, 4])),
        "context_parallel_size": draw(st.sampled_from([1, 2, 3, 4, 5, 8])),
        "cp_comm_type": draw(st.sampled_from([["p2p"], ["a2a"]])),
        "lighthouse_levels": draw(st.sampled_from([None, None, 2, 3, 4])),
        "lighthouse_tile_budget": tile,
        "lighthouse_budget": draw(st.sampled_from([None, None, 512, 1000, 1536, 2048, 4096])),
        "lighthouse_edge_budget": draw(st.sampled_from([None, None, None, 1024, 3072, 3000])),
        "lighthouse_scorer": draw(st.sampled_from(["norm", "norm", "dilated"])),
    }


TRIED: list[str] = []


@settings(derandomize=True, max_examples=100, deadline=None, database=None)
@given(runs())
def test_what_is_offered_is_taken(run: dict[str, object]) -> None:
    found = problems(run)
    assume(len(found) == 1)  # else a remedy of one leaves the others
    for name in ("edge_budget", "budget", "tile_budget"):  # a budget alone is said before what else is wrong of the length
        if found[0].startswith(f"--lighthouse-{name.replace('_', '-')} ") and "positive" in found[0]:
            assume(problems(run | {f"lighthouse_{name}": None}) == [])
    for offer in advice(found[0]):
        if "cp_comm_type" in offer:
            continue
        TRIED.append(found[0])
        changes = {f"lighthouse_{name}" if name in OURS else name: value for name, value in offer.items()}
        assert problems(run | changes) == [], (found[0], offer)


@pytest.mark.parametrize(
    ("changes", "use"),
    [
        ({"num_query_groups": 6}, "--num-query-groups 4 or 8, or --num-attention-heads 30 or 36"),
        ({"num_query_groups": 6, "tensor_model_parallel_size": 4}, "--num-query-groups 4 or 8"),
        ({"num_attention_heads": 36}, "--num-query-groups 6 or 9, or --num-attention-heads 32 or 40"),
        ({"num_attention_heads": 33, "kv_channels": None}, "--num-query-groups 3 or 11, or --num-attention-heads 32"),
        ({"hidden_size": 4100, "kv_channels": None}, "4096 or 4160, or give --kv-channels"),
        ({"global_batch_size": 12}, "--global-batch-size 8 or 16"),
        ({"eval_global_batch_size": 12, "eval_micro_batch_size": 1}, "--eval-global-batch-size 8 or 16"),
        ({"save": "x", "save_interval": 100, "save_retain_interval": 250}, "200 or 300"),
        ({"log_memory_interval": 25}, "20 or 30"),
        ({"num_distributed_optimizer_instances": 3}, "2 or 4"),
        ({"num_experts": 30, "expert_model_parallel_size": 4}, "--expert-model-parallel-size 2, or --num-experts 28 or 32"),
        ({"num_experts": 96, "expert_model_parallel_size": 12, "nodes": 2}, "--expert-model-parallel-size 8 or 16"),
        ({"tensor_model_parallel_size": 16, "nodes": 2, "num_query_groups": 8}, "--tensor-model-parallel-size 8"),
        (
            {"attention": "dense", "cp_comm_type": ["a2a"], "context_parallel_size": 8, "num_query_groups": 4},
            "--cp-comm-type p2p, or --context-parallel-size 4",
        ),
        (
            {"attention": "dense", "seq_length": 131080, "max_position_embeddings": 2**18, "context_parallel_size": 8},
            "131072 or 131088",
        ),
        (
            {"context_parallel_size": 6, "nodes": 6, "tensor_model_parallel_size": 2, "sequence_parallel": True},
            "--context-parallel-size 4 or 8",
        ),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, dict) else "",
)
def test_the_nearest_on_both_sides_are_offered(changes: dict[str, object], use: str) -> None:
    """And each is taken, where it is all that is wrong."""
    run = {"nodes": 1, **changes}
    found = problems(run)
    said = [problem for problem in found if problem.endswith(f"use {use}.")]
    assert said, found
    for offer in advice(said[0]) if said == found else ():
        if "cp_comm_type" not in offer:
            assert problems(run | offer) == [], offer


def test_many_were_tried() -> None:
    """By the test above, of each kind: else it holds nothing."""
    if not TRIED:
        test_what_is_offered_is_taken()
    for begins in ("--seq-length", "--lighthouse-budget", "--lighthouse-edge-budget", "--lighthouse-tile-budget"):
        assert any(said.startswith(begins) for said in TRIED), begins
    assert any("use --nodes" in said for said in TRIED)
    assert any("or --context-parallel-size" in said for said in TRIED)
