"""Wall over context-parallel ranks: as on one, and what is sent as it was counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lighthouse.context_parallel import exchange as exchange_module
from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.lighthouse.geometry import Shape
from megatron_lighthouse.lighthouse.sharded.sent import attend_bytes
from megatron_lighthouse.sequence.documents import Documents
from megatron_lighthouse.sequence.layout import Layout
from megatron_lighthouse.variant import Place
from megatron_lighthouse.wall.attention import wall_attention
from megatron_lighthouse.wall.config import WallConfig
from megatron_lighthouse.wall.cut import Step
from megatron_lighthouse.wall.variant import WALL
from tests.context_parallel.shards import shards_of, whole
from tests.ranks import run_ranks
from tests.tolerances import assert_close
from tests.wall.oracle import formula, inputs, with_grads

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "strong gates": ({"gate": -9.0, "scalar": -0.3, "sink": True}, {"softmax_scale": 0.8}),
    "shared gates": ({"tied": True}, {}),
    "window": ({"scalar": -0.1}, {"window": 10}),
    "documents": ({"gate": 0.0, "sink": True}, {"documents": True}),
    "documents and a window": ({"tied": True}, {"documents": True, "window": 5}),
}


def on_rank(group: dist.ProcessGroup, cases: list[tuple[list[Tensor], dict[str, Any]]], step: int) -> list[list[Tensor]]:
    found = []
    tokens, Step.TOKENS = Step.TOKENS, step
    for tensors, how in cases:
        rows = [x if x.dim() == 1 else shards_of(group, [x])[0] for x in tensors]
        found.append(with_grads(wall_attention, rows, cp_group=group, **how))
    Step.TOKENS = tokens
    return found


def case(name: str, tokens: int, heads: int, groups: int) -> tuple[list[Tensor], dict[str, Any]]:
    given, how = CASES[name]
    how = dict(how)
    documents = how.pop("documents", False)
    if documents:
        how["cu_seqlens"] = torch.tensor([0, 1, 2, tokens // 3, tokens // 3, tokens - 5, tokens])
    return inputs(tokens, 1 if documents else 2, heads, groups, (5, 3), **given), how


@pytest.mark.parametrize("size", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("comm_type", ["p2p", "all_gather", "a2a"])
def test_ranks_equal_one(comm_type: str, size: int) -> None:
    """With grouped heads, V that is not K, and chunks of six tokens in pieces of four."""
    groups = size if comm_type == "a2a" else 2
    cases = [case(name, 12 * size, 2 * groups, groups) for name in CASES]
    ranks = run_ranks(size, on_rank, [(x, {"cp_comm_type": comm_type, **how}) for x, how in cases], 4)
    for (tensors, how), shards in zip(cases, zip(*ranks, strict=True), strict=True):
        for expected, found in zip(with_grads(formula, tensors, **how), zip(*shards, strict=True), strict=True):
            together = sum(found) if expected.dim() == 1 else whole(found)
            assert_close(together, expected, "ranks float64")


def in_turns_on_rank(group: dist.ProcessGroup, tensors: list[Tensor], comm_type: str) -> list[list[Tensor]]:
    """Gradients of all inputs, twice, and of one of them between."""
    tokens, Step.TOKENS = Step.TOKENS, 4
    *leaves, grad = (x.requires_grad_() for x in shards_of(group, tensors))
    query, key, value, gate, scalar = leaves
    out = wall_attention(query, key, value, gate, scalar_gate=scalar, cp_group=group, cp_comm_type=comm_type)
    turns = (leaves, leaves[:1], leaves)
    found = [list(torch.autograd.grad(out, some, grad.detach(), retain_graph=True)) for some in turns]
    Step.TOKENS = tokens
    return found


@pytest.mark.parametrize("comm_type", ["p2p", "all_gather"])
def test_a_backward_for_some_inputs_leaves_nothing_behind(comm_type: str) -> None:
    """The gradients of what lies between pieces are summed aside."""
    for first, _, again in run_ranks(2, in_turns_on_rank, inputs(24, 1, 4, 2, (4, 4), scalar=-0.1), comm_type):
        assert all(map(torch.equal, first, again))


TOKENS, BATCH, HEADS, GROUPS, DIM = 64, 2, 8, 4, 8


def sent_by(group: dist.ProcessGroup, comm_type: str, config: WallConfig) -> list[dict[str, int]]:
    """What this rank sends forward, and backward."""
    scalar = -0.1 if config.scalar_gate else None
    query, key, value, gate, *more, grad = inputs(
        TOKENS, BATCH, HEADS, GROUPS, (DIM, DIM), tied=config.tied_gates, scalar=scalar
    )
    logits = gate[..., ::2] if config.paired_gates else gate
    given = [query, key, value, logits, *(x.unsqueeze(-1) for x in more), grad]
    *leaves, grad = (x.float().requires_grad_() for x in shards_of(group, given))
    layer = WALL.build(config, leaves[0], leaves[1], Place(exchange=Exchange.over(group), comm_type=comm_type))
    exchange_module.sent.clear()
    out, _ = layer(*leaves)
    forward = dict(exchange_module.sent)
    exchange_module.sent.clear()
    out.backward(grad)
    return [forward, dict(exchange_module.sent)]


@pytest.mark.parametrize("comm_type", ["p2p", "all_gather", "a2a"])
@pytest.mark.parametrize(
    "config",
    [WallConfig(), WallConfig(tied_gates=True, scalar_gate=True), WallConfig(paired_gates=True)],
    ids=["", "shared", "paired"],
)
def test_ranks_send_what_was_counted(comm_type: str, config: WallConfig) -> None:
    for rank, ways in enumerate(run_ranks(4, sent_by, comm_type, config)):
        plan = WALL.sent(config, TOKENS, Shape(BATCH, HEADS, GROUPS, DIM, 4), Layout(4, rank), comm_type)
        for way, sent in enumerate(ways):
            assert sent == {name: both[way] for name, both in plan.items()}


def test_shared_gates_cost_no_more_than_dense_attention() -> None:
    """But for the sums of pieces; of their own, as many keys as query heads: (R + 1) / 2 times as much."""
    layer, rank = Shape(1, 8, 2, 64, 2), Layout(4, 1)
    dense = attend_bytes("p2p", 8192, layer, rank)
    assert WALL.sent(WallConfig(tied_gates=True), 8192, layer, rank, "p2p")["attend"] == dense
    whole = WALL.sent(WallConfig(), 8192, layer, rank, "p2p")
    assert [2 * n for n in whole["attend"]] == [5 * n for n in dense]
    assert sum(whole["totals"]) < 0.02 * sum(whole["attend"])


def documents_on_rank(group: dist.ProcessGroup | None, tensors: list[Tensor], comm_type: str) -> list[Tensor]:
    """Output and gradients of a layer under Megatron, of logits of gates: of this rank's rows, and each row's token."""
    place, tokens = Place(exchange=Exchange.over(group), comm_type=comm_type, sinks=True), Step.TOKENS
    Step.TOKENS = 5
    documents = Documents.of(torch.tensor([0, 1, 20, 23, len(tensors[0])], dtype=torch.int32), len(tensors[0]))
    own = documents.rows_of_rank(place.exchange.layout if place.exchange else Layout(1, 0))
    *leaves, sink, grad = (x.clone().requires_grad_() if x.dim() == 1 else x[own].requires_grad_() for x in tensors)
    config = WallConfig(scalar_gate=True, tied_gates=True)
    out, _ = WALL.build_documents(config, leaves[0], leaves[1], place)(*leaves, documents=documents, sinks=sink)
    Step.TOKENS = tokens
    return [out.detach(), *torch.autograd.grad(out, [*leaves, sink], grad.detach()), own]


@pytest.mark.parametrize("comm_type", ["p2p", "all_gather", "a2a"])
def test_documents_in_zigzag_equal_those_of_one_rank(comm_type: str) -> None:
    """Of lengths that no number of chunks divides."""
    tensors = inputs(48, 1, 8, 4, (4, 4), gate=2.0, tied=True, scalar=1.0, sink=True)
    tensors[4] = tensors[4].unsqueeze(-1)
    expected = documents_on_rank(None, tensors, comm_type)[:-1]
    for size in (2, 4):
        ranks = run_ranks(size, documents_on_rank, tensors, comm_type)
        place = torch.cat([own for *_, own in ranks])
        for one, shards in zip(expected, zip(*(found[:-1] for found in ranks), strict=True), strict=True):
            together = sum(shards) if one.dim() == 1 else torch.empty_like(one).index_copy(0, place, torch.cat(shards))
            assert_close(together, one, "ranks float64")
