"""Wall over context-parallel ranks: as on one, and what is sent as it was counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lighthouse.wall.attention import wall_attention
from megatron_lighthouse.wall.layer import Step
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


@pytest.mark.parametrize("size", [2, 4, 8])
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
