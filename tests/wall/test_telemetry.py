"""Half-lives of the gates against float64: of both kinds of layers, of heads shared out over ranks, and drawn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from megatron_lighthouse import LighthouseConfig, running
from megatron_lighthouse.lighthouse.geometry import Shape
from megatron_lighthouse.variant import Place
from megatron_lighthouse.variants import LIGHTHOUSE, WALL
from megatron_lighthouse.wall import telemetry
from megatron_lighthouse.wall.config import WallConfig
from megatron_lighthouse.wall.telemetry import HalfLives
from tests.tolerances import assert_close

TOKENS, BATCH, HEADS, GROUPS, DIM = 64, 2, 4, 2, 7
SHAPE = Shape(BATCH, HEADS, GROUPS, DIM, 4)


def given(gate_heads: int, seed: int) -> list[Tensor]:
    """Queries, keys, values and the logits of gates, each head with another bias."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(TOKENS, BATCH, heads, DIM, generator=generator) for heads in (HEADS, GROUPS, GROUPS, gate_heads)]
    rows[3] += 2.0 * torch.arange(gate_heads).unsqueeze(1)
    return rows


def expected(logits: list[Tensor], most: float) -> dict[str, list[float]]:
    """By quartile, of each head; by numpy, of lives in order, none of which lies between two."""
    x = torch.cat(logits).double().numpy()
    gates = -numpy.log1p(numpy.exp(-x))
    gates = most * numpy.expm1(gates / most) if most else gates
    lives = numpy.sort(math.log(2) / -gates.mean((0, 1)), -1)
    inner = numpy.sort(-gates.mean((0, 1)), -1)[:, ::-1]
    assert DIM == 7, "quartiles at 1.5, 3 and 4.5"
    between = {"p25": (1, 2), "p75": (4, 5)}
    found = {name: (math.log(2) / inner[:, [a, b]].mean(1)).tolist() for name, (a, b) in between.items()}
    return {**found, "p50": lives[:, 3].tolist()}


def layer_of(kind: str, config: WallConfig, rows: list[Tensor]) -> Any:
    if kind == "wall":
        return WALL.build(config, rows[0], rows[1], Place(number=3))
    own = LighthouseConfig(levels=2, pooling=2, budget=8, tile_budget=4, around="wall")
    return LIGHTHOUSE.build(own, rows[0], rows[1], Place(number=3, around=config))


@pytest.mark.parametrize("kind", ["wall", "around"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("most", [0.0, 0.86])
def test_they_are_those_of_float64(kind: str, tied: bool, most: float) -> None:
    """Of two micro-batches, and of a layer that did not run nothing."""
    config = WallConfig(tied_gates=tied, gate_max=most)
    log, heads = WALL.telemetry(config), GROUPS if tied else HEADS
    calls = [given(heads, seed) for seed in range(2)]
    layer = layer_of(kind, config, calls[0])
    with log.watching((3, 4)):
        for rows in calls:
            layer(*rows)
        scalars = log.scalars((3, 4), log.sums((3, 4), SHAPE, 0, 1))
    lives = expected([rows[3] for rows in calls], most)
    assert scalars.keys() == {f"wall/half-life/layer-3/head-{head}/{name}" for name in lives for head in range(heads)}
    found = {name: [scalars[f"wall/half-life/layer-3/head-{head}/{name}"] for head in range(heads)] for name in lives}
    for name in lives:
        assert_close(found[name], lives[name], "float32")
    assert telemetry.watched() == {}


@pytest.mark.parametrize("tied", [False, True])
def test_ranks_that_share_out_heads_add_up(tied: bool) -> None:
    gate, log = torch.rand(TOKENS, BATCH, GROUPS if tied else HEADS, DIM).neg(), HalfLives(tied)
    sums = []
    for parts in (gate.chunk(1, 2), gate.chunk(2, 2)):
        total = torch.zeros(1, gate.shape[2], DIM + 1, dtype=torch.float64)
        for rank, part in enumerate(parts):
            with log.watching((1,)), running.layer(1):
                telemetry.record(part)
                total += log.sums((1,), SHAPE, rank, len(parts))
        sums.append(total)
    assert torch.equal(*sums)


def test_nothing_is_recorded_of_what_is_not_watched() -> None:
    with HalfLives(False).watching((1,)), running.layer(2):
        telemetry.record(torch.zeros(1, 1, 1, 1))
        assert telemetry.watched() == {}


def test_what_never_fades_lasts_for_ever(tmp_path: Path) -> None:
    """And is drawn as nothing, beside what fades."""
    log = HalfLives(False)
    gate = torch.zeros(TOKENS, BATCH, HEADS, DIM)
    gate[:, :, 1:] = -0.5
    with log.watching((1,)), running.layer(1):
        telemetry.record(gate)
        scalars = log.scalars((1,), log.sums((1,), SHAPE, 0, 1))
    assert scalars["wall/half-life/layer-1/head-0/p50"] == math.inf
    assert scalars["wall/half-life/layer-1/head-1/p50"] == pytest.approx(2 * math.log(2))
    log.draw(scalars, tmp_path, 7)
    assert (tmp_path / "half-life.png").stat().st_size > 1000
