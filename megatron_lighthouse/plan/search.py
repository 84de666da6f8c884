"""Layouts in the order of their predicted speed; where Lighthouse overtakes dense attention."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_lighthouse.lighthouse.config import LighthouseConfig
from megatron_lighthouse.mcore.command_line.tiles import mlp_tile_tokens
from megatron_lighthouse.nearest import divisors
from megatron_lighthouse.plan import memory
from megatron_lighthouse.plan.coefficients import Coefficients
from megatron_lighthouse.plan.layer_time import Setup, dense_layer, lighthouse_layer
from megatron_lighthouse.plan.run import RECOMPUTE, Run
from megatron_lighthouse.plan.stages import FRACTION, Stages

SCHEMES = ("p2p", "a2a")
"""What the ranking tries: all_gather holds the keys of all ranks and hides nothing (docs/context_parallel.md)."""

type Held = Mapping[str, Any]
"""Fields of a layout that are given, by their names in `Run`."""
NOTHING: Held = {}


@dataclass(frozen=True)
class Ranking:
    layouts: list[tuple[Run, float]]
    """Runs both of whose stages are accepted and fit, with tokens/s/GPU over both, best first."""
    refused: Counter[str]
    """Flag or 'memory' -> layouts that it refused."""
    fraction: float = FRACTION

    @property
    def recommended(self) -> tuple[Run, float]:
        """The fastest whose memory is not tight; where all are, the fastest. There must be one."""
        fit = (found for found in self.layouts if not memory.tight(Stages(found[0], self.fraction).fullest))
        return next(fit, self.layouts[0])


def rank(run: Run, speed: Coefficients, fraction: float = FRACTION, held: Held = NOTHING) -> Ranking:
    """All layouts of the run's GPUs, length and batch, by how soon both stages are done."""
    refused = Counter[str]()
    found = [(stages.run, stages.tokens_per_gpu(speed)) for stages in fitting(run, fraction, held, refused)]
    # where the speed is the same, the layout that needs less memory
    return Ranking(sorted(found, key=lambda x: (-round(x[1], 3), memory.total(x[0]))), refused, fraction)


def fitting(run: Run, fraction: float, held: Held = NOTHING, refused: Counter[str] | None = None) -> Iterator[Stages]:
    """Those of the layouts in which both stages are accepted and fit; what refuses the others is counted in `refused`."""
    for layout in layouts(run, held):
        stages, why = Stages(layout, fraction), "memory"
        try:
            if memory.fits(stages.check().fullest):
                yield stages
                continue
        except ValueError as error:
            why = str(error).split()[0]
        if refused is not None:
            refused[why] += 1


def layouts(run: Run, held: Held = NOTHING) -> Iterator[Run]:
    """All of the run's GPUs; of a field that is held, such as have its value."""

    def tried(name: str, values: Iterable[Any]) -> Iterable[Any]:
        return (value for value in values if value == held.get(name, value))

    model = run.model
    for tp in tried("tensor_parallel", divisors(math.gcd(model.groups, run.gpus))):
        if not run.device.holds(run.change(tensor_parallel=tp).spans["tensor parallel"]) and "tensor_parallel" not in held:
            continue  # tensor parallelism stays within an NVLink domain
        for pp in tried("pipeline_parallel", divisors(math.gcd(model.layers, run.gpus // tp))):
            for cp in tried("context_parallel", divisors(run.gpus // (tp * pp))):
                for scheme in [held["cp_comm_type"]] if "cp_comm_type" in held else SCHEMES[: 1 if cp == 1 else None]:
                    sizes = {"tensor_parallel": tp, "pipeline_parallel": pp, "context_parallel": cp}
                    for way in ways(run.change(**sizes, cp_comm_type=scheme)):
                        if way.recompute == held.get("recompute", way.recompute):
                            yield way


def ways(run: Run) -> Iterator[Run]:
    """What it may compute again in backward, that which needs most memory first; the last with the MLPs in tiles."""
    tile = mlp_tile_tokens(run.model.ffn // run.tensor_parallel)
    yield from (run.change(recompute=recompute) for recompute in RECOMPUTE)
    if not run.mlp_tile_tokens and run.tokens > tile:
        yield run.change(recompute=RECOMPUTE[-1], mlp_tile_tokens=tile)


def crossover(run: Run, speed: Coefficients) -> list[tuple[int, int, float]]:
    """(length, budget, times as fast as dense) of one layer, forward + backward, from 4,096 tokens on by doubling to 1M.

    Levels and budgets are those of each length; lengths that the config refuses are left out.
    """
    rows, setup = [], Setup(run.layer, run.device, speed, run.context_parallel, run.cp_comm_type, run.spans["context parallel"])
    for length in (2**n for n in range(12, 21)):
        config = LighthouseConfig.for_length(length, pooling=run.config.pooling, scorer=run.config.scorer)
        try:
            geometry = config.geometry(length, run.context_parallel)
        except ValueError:
            continue
        dense, ours = dense_layer(length, setup), lighthouse_layer(geometry, setup, config.scorer)
        rows.append((length, config.budget, dense["fwd+bwd"] / ours["fwd+bwd"]))
    return rows
