"""Each remedy that a refusal offers is taken: no second rule refuses it, of lengths, budgets, ranks, batches and scorers."""

from __future__ import annotations

from argparse import Namespace
from functools import cache

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


def test_many_were_tried() -> None:
    """By the test above, of each kind: else it holds nothing."""
    if not TRIED:
        test_what_is_offered_is_taken()
    for begins in ("--seq-length", "--lighthouse-budget", "--lighthouse-edge-budget", "--lighthouse-tile-budget"):
        assert any(said.startswith(begins) for said in TRIED), begins
    assert any("use --nodes" in said for said in TRIED)
    assert any("or --context-parallel-size" in said for said in TRIED)
