"""Layouts in the order of their predicted speed; where Lighthouse overtakes dense attention."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_lighthouse.lighthouse.config import LighthouseConfig
from megatron_lighthouse.mcore.command_line.tiles import mlp_tile_tokens
from megatron_lighthouse.plan import memory, time
from megatron_lighthouse.plan.coefficients import Coefficients
from megatron_lighthouse.plan.run import RECOMPUTE, Run
from megatron_lighthouse.plan.stages import FRACTION, Stages

SCHEMES = ("p2p", "a2a")
"""What the ranking tries: all_gather holds the keys of all ranks and hides nothing (docs/context_parallel.md)."""


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


def rank(run: Run, speed: Coefficients, fraction: float = FRACTION) -> Ranking:
    """All layouts of the run's GPUs, length and batch, by how soon both stages are done."""
    found, refused = [], Counter[str]()
    for layout in layouts(run):
        stages = Stages(layout, fraction)
        try:
            stages.check()
        except ValueError as error:
            refused[str(error).split()[0]] += 1
            continue
        if memory.fits(stages.fullest):
            found.append((layout, stages.tokens_per_gpu(speed)))
        else:
            refused["memory"] += 1
    # where the speed is the same, the layout that needs less memory
    return Ranking(sorted(found, key=lambda x: (-round(x[1], 3), memory.total(x[0]))), refused, fraction)


def layouts(run: Run) -> Iterator[Run]:
    model = run.model
    for tp in _divisors(math.gcd(model.groups, run.gpus)):
        if not run.device.holds(run.change(tensor_parallel=tp).spans["tensor parallel"]):
            continue  # tensor parallelism stays within an NVLink domain
        for pp in _divisors(math.gcd(model.layers, run.gpus // tp)):
            for cp in _divisors(run.gpus // (tp * pp)):
                for scheme in SCHEMES[: 1 if cp == 1 else None]:
                    sizes = {"tensor_parallel": tp, "pipeline_parallel": pp, "context_parallel": cp}
                    yield from ways(run.change(**sizes, cp_comm_type=scheme))


def ways(run: Run) -> Iterator[Run]:
    """What it may compute again in backward, that which needs most memory first; the last with the MLPs in tiles."""
    tile = mlp_tile_tokens(run.model.ffn // run.tensor_parallel)
    yield from (run.change(recompute=recompute) for recompute in RECOMPUTE)
    if not run.mlp_tile_tokens and run.tokens > tile:
        yield run.change(recompute=RECOMPUTE[-1], mlp_tile_tokens=tile)


def _divisors(value: int) -> list[int]:
    return [n for n in range(1, value + 1) if value % n == 0]


def crossover(run: Run, speed: Coefficients) -> list[tuple[int, int, float]]:
    """(length, budget, times as fast as dense) of one layer, forward + backward, from 4,096 tokens on by doubling to 1M.

    Levels and budgets are those of each length; lengths that the config refuses are left out.
    """
    rows = []
    cp, span = run.context_parallel, run.spans["context parallel"]
    for length in (2**n for n in range(12, 21)):
        config = LighthouseConfig.for_length(length, pooling=run.config.pooling, scorer=run.config.scorer)
        try:
            geometry = config.geometry(length, cp)
        except ValueError:
            continue
        shape = (run.layer, cp, run.cp_comm_type, span, run.device, speed)
        dense, ours = time.dense_layer(length, *shape), time.lighthouse_layer(geometry, *shape, config.scorer)
        rows.append((length, config.budget, dense["fwd+bwd"] / ours["fwd+bwd"]))
    return rows
