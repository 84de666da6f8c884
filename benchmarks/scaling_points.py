"""The training runs of the scaling study on 2, 4 or 8 GPUs ([docs/scaling.md](../docs/scaling.md)).

`python benchmarks/scaling_points.py [--machine 4]` prints them, each with what the plan expects of it, and those that are left
out with the reason. `--gpus N --stage S [--attention A]` prints, for benchmarks/scaling.sh, those that take N GPUs in a stage:
folder, study, iterations and more of Megatron's arguments, apart by tabs.

Left out is what the plan says does not fit, and what would train for more than `SECONDS`; but not what the study is for.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace
from functools import cached_property

from megatron_lighthouse.lighthouse.config import LighthouseConfig
from megatron_lighthouse.plan import memory, time
from megatron_lighthouse.plan.calibration import MEASURED_VOCAB, coefficients
from megatron_lighthouse.plan.device import DEVICES
from megatron_lighthouse.plan.run import Run, run_of
from megatron_lighthouse.plan.words import RECOMPUTE_WORDS
from megatron_lighthouse.variants import VARIANTS

K = 1024
LENGTHS = (256 * K, 512 * K, 1024 * K)
SIZES = (1, 2, 4, 8)
MACHINES = (2, 4, 8)
"""GPUs of a machine that the study runs on."""
STAGES = ("study", "million", "late")
"""In their order, for a machine may be taken away: scaling, a million tokens by the recipe, and what can wait."""
TOKENS = 128 * K
"""Of a rank, in weak scaling: N = TOKENS · C."""
SECONDS = 180
"""Of training, by the plan, that a point may take."""
START = 60
"""Seconds that a point takes beside its steps: 45 were measured on two GPUs."""
RECIPE_1M = LighthouseConfig(4, 4, 4096)
"""Of launch/recipes/530m-1m.args."""


def by_length(seq_length: int) -> LighthouseConfig:
    """L = 3, p = 4, k = N/128."""
    return LighthouseConfig(3, 4, seq_length // 128)


@dataclass(frozen=True)
class Point:
    """One training run of the 530M model on one sequence a data-parallel rank."""

    attention: str
    seq_length: int
    context_parallel: int
    folder: str = "study"
    """Points of one folder differ in attention, length and context-parallel ranks."""
    config: LighthouseConfig | None = None
    """`by_length` where there is none."""
    recompute: str = "full"
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    dense: int = 2
    """Dense layers at either end of a Lighthouse run."""
    cp_comm_type: str = "p2p"
    global_batch: int = 1
    wanted: bool = False
    """Whether it runs however long it takes: a target of the study."""
    stage: str = STAGES[0]

    @cached_property
    def run(self) -> Run:
        """As the plan knows it."""
        run = run_of("530m-98k", device=DEVICES["h100"], gpus=self.gpus, global_batch=self.global_batch)
        model = replace(run.model, vocab=MEASURED_VOCAB, dense_first=self.dense, dense_last=self.dense)
        run = run.change(model=model, config=self.config or by_length(self.seq_length), attention=self.attention)
        names = ("seq_length", "context_parallel", "tensor_parallel", "pipeline_parallel", "recompute", "cp_comm_type")
        return run.change(**{name: getattr(self, name) for name in names}).check()

    @property
    def gpus(self) -> int:
        return self.context_parallel * self.tensor_parallel * self.pipeline_parallel

    @cached_property
    def step(self) -> float:
        """Seconds, by the plan."""
        return self.seq_length * self.global_batch / time.tokens_per_gpu(self.run, coefficients()) / self.gpus

    @property
    def iterations(self) -> int:
        """The first three warm up, where steps are long the first two (`plan scaling`)."""
        return 8 if self.step < 3 else 5 if self.step < 10 else 4 if self.step < 15 else 3

    @property
    def left_out(self) -> str | None:
        """Why it does not run; None where it does."""
        need, usable = memory.total(self.run) / 2**30, DEVICES["h100"].usable_bytes / 2**30
        if not memory.fits(self.run):
            return f"needs {need:.0f} of {usable:.0f} GiB"
        seconds = self.step * self.iterations
        return f"trains for {seconds:.0f} s" if seconds > SECONDS and not self.wanted else None

    @property
    def study(self) -> str:
        """For launch/local.sh."""
        return f"CP={self.context_parallel} SEQ={self.seq_length} ATTENTION={self.attention}"

    @property
    def arguments(self) -> str:
        """Megatron's, beyond those of the recipe and of `study`."""
        config = self.config or by_length(self.seq_length)
        words = [f"--lighthouse-levels {config.levels} --lighthouse-budget {config.budget}", RECOMPUTE_WORDS[self.recompute]]
        words += [f"--lighthouse-dense-first {self.dense} --lighthouse-dense-last {self.dense}"] if self.dense != 2 else []
        words += (
            [f"--tensor-model-parallel-size {self.tensor_parallel} --sequence-parallel"] if self.tensor_parallel > 1 else []
        )
        words += [f"--pipeline-model-parallel-size {self.pipeline_parallel}"] if self.pipeline_parallel > 1 else []
        words += [f"--cp-comm-type {self.cp_comm_type}"] if self.cp_comm_type != "p2p" else []
        words += [f"--global-batch-size {self.global_batch}"] if self.global_batch > 1 else []
        # what hangs is to end soon, but not what waits for a step that the host is ahead of
        words.append(f"--distributed-timeout-minutes {1 + math.ceil(2 * self.step / 60)}")
        return " ".join(filter(None, words))


def candidates(machine: int = max(MACHINES)) -> list[Point]:
    """All that a machine of so many GPUs is to run, stage by stage: what runs, and what `left_out` drops."""
    million, quarter = 1024 * K, 256 * K
    sizes = [c for c in reversed(SIZES) if c <= machine]
    points = [Point(a, n, c) for c in sizes for n in LENGTHS if n < million for a in ("lighthouse", "dense")]
    points += [Point(a, TOKENS, 1) for a in ("lighthouse", "dense")]
    recompute = "mlp" if machine == 8 else "full"  # fewer have no room for it without recomputing all
    recipe = Point("lighthouse", million, machine, "1m", RECIPE_1M, recompute, wanted=True, stage="million")
    points += [replace(recipe, folder="1m-all-layers", dense=0), replace(recipe, folder="1m-one-dense", dense=1)]
    points += [recipe, replace(recipe, attention="dense")]
    late = [
        Point("lighthouse", quarter, machine // 2, "tp2", tensor_parallel=2),
        Point("lighthouse", quarter, machine // 2, "pp2", pipeline_parallel=2, global_batch=4),
    ]
    late += [Point("lighthouse", quarter, min(4, machine), scheme, cp_comm_type=scheme) for scheme in ("all_gather", "a2a")]
    late += [Point(a, million, c) for c in sizes for a in ("lighthouse", "dense")]
    return points + [replace(point, stage="late") for point in late]


def all_candidates() -> list[Point]:
    """Of all machines, each once."""
    return list(dict.fromkeys(point for machine in reversed(MACHINES) for point in candidates(machine)))


def points(gpus: int, machine: int = max(MACHINES), stage: str | None = None, attention: str | None = None) -> list[Point]:
    """Those that run on `gpus` of its GPUs, in one stage or in all."""
    found = [p for p in candidates(machine) if p.gpus == gpus and attention in (None, p.attention)]
    return [p for p in found if p.left_out is None and stage in (None, p.stage)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", type=int, choices=MACHINES, default=max(MACHINES), help="its GPUs")
    parser.add_argument("--gpus", type=int, choices=SIZES)
    parser.add_argument("--stage", choices=STAGES)
    parser.add_argument("--attention", choices=list(VARIANTS))
    options = parser.parse_args()
    machine = options.machine
    if options.gpus:
        for p in points(options.gpus, machine, options.stage, options.attention):
            print(p.folder, p.study, p.iterations, p.arguments, sep="\t")
        return
    for p in candidates(machine):
        name = f"{p.folder:14} {p.study:40} {p.gpus} GPUs, recompute {p.recompute}"
        print(f"{name}: {p.left_out or f'{p.iterations} steps of {p.step:.1f} s'}{', left out' if p.left_out else ''}")
    for stage in STAGES:
        for gpus in reversed(SIZES):
            if found := points(gpus, machine, stage):
                seconds = sum(START + p.step * p.iterations for p in found)
                print(f"{stage}, {gpus} GPUs: {len(found)} points, about {seconds:.0f} s one after another")


if __name__ == "__main__":
    main()
