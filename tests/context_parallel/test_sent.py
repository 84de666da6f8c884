"""What is planned to be sent is what is sent, to the byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed import ProcessGroup

from megatron_lighthouse import LighthouseConfig, lighthouse_attention
from megatron_lighthouse.context_parallel import exchange
from megatron_lighthouse.lighthouse.geometry import Shape
from megatron_lighthouse.lighthouse.scorers import SCORERS
from megatron_lighthouse.lighthouse.sharded.sent import layer_bytes, summary
from megatron_lighthouse.sequence.layout import Layout
from tests.ranks import run_ranks

TOKENS, BATCH, HEADS, GROUPS, DIM = 256, 2, 8, 4, 8
SELECT_ALONE = LighthouseConfig(levels=3, pooling=2, budget=32, tile_budget=4)
DEAL = SELECT_ALONE.replace(tile_budget=32)
SHARED = DEAL.replace(heads_per_selection=2)
"""Taken with narrower values."""


def value_dim(config: LighthouseConfig) -> int:
    return 6 if config == SHARED else DIM


def _sent(group: ProcessGroup, config: LighthouseConfig, comm_type: str) -> list[dict[str, int]]:
    """What this rank sends forward, and backward."""
    torch.manual_seed(group.rank())
    tokens = TOKENS // group.size()
    shapes = ((HEADS, DIM), (GROUPS, DIM), (GROUPS, value_dim(config)))
    query, key, value = (torch.randn(tokens, BATCH, *shape, requires_grad=True) for shape in shapes)
    ways: list[dict[str, int]] = []
    exchange.sent.clear()
    out = lighthouse_attention(query, key, value, config, cp_group=group, cp_comm_type=comm_type)
    ways.append(dict(exchange.sent))
    exchange.sent.clear()
    out.sum().backward()
    return [*ways, dict(exchange.sent)]


@pytest.mark.parametrize("comm_type", ["p2p", "all_gather", "a2a"])
@pytest.mark.parametrize("config", [SELECT_ALONE, DEAL, SHARED], ids=["ranks select alone", "one tile", "shared selections"])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_send_what_was_planned(size: int, config: LighthouseConfig, comm_type: str) -> None:
    geometry = config.geometry(TOKENS, size)
    layer = Shape(BATCH, HEADS, GROUPS, DIM, 4, value_dim(config), config.heads_per_selection or 1)
    for rank, ways in enumerate(run_ranks(size, _sent, config, comm_type)):
        plan = layer_bytes(comm_type, geometry, layer, Layout(size, rank))
        for way, sent in enumerate(ways):
            planned: dict[str, Any] = {name: both[way] for name, both in plan.items() if both[way]}
            most = planned.pop("deal", 0)
            assert sent.pop("deal", 0) <= most
            assert sent == planned


@pytest.mark.parametrize("scorer", [name for name in SCORERS if name != "norm"])
def test_what_a_scorer_sends_was_planned(scorer: str) -> None:
    config = SELECT_ALONE.replace(scorer=scorer)
    layer, geometry = Shape(BATCH, HEADS, GROUPS, DIM, 4), config.geometry(TOKENS, 4)
    for rank, (sent, _) in enumerate(run_ranks(4, _sent, config, "p2p")):
        planned = layer_bytes("p2p", geometry, layer, Layout(4, rank), scorer)
        assert sent == {name: forward for name, (forward, _) in planned.items()}
        assert sent["scorer"] > 0


def test_the_line_at_the_start_names_every_scheme_and_the_way_of_selecting() -> None:
    layer = Shape(1, 8, 8, 128, 2)
    line = summary(LighthouseConfig().geometry(98304), layer, 2, "p2p")
    # keys and values of 4,608 rows or twice that, at 4 KB a row, three ways: 4,608 * 4096 * (2 + 2 + 1) and the halo's 16 rows
    assert "a rank sends 94.4 MB in a layer and step by p2p (113.3 by all_gather, 75.5 by a2a)" in line
    assert "each of 12 tiles lies in one of 4 chunks" in line
    line = summary(LighthouseConfig(tile_budget=1536).geometry(98304), layer, 2, "a2a")
    assert "at most" in line
    assert "1 tile spans the 4 chunks" in line
