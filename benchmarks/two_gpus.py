"""`python benchmarks/two_gpus.py --out FOLDER`: training steps of the 530M model's layers on two GPUs, and on one of them.

32,768 tokens (k = 512) and 98,304 (k = 1536) by context parallelism over both and on one, dense and 26 of 30 layers Lighthouse,
under Megatron's CUDA graphs too; packed documents and graphs by tensor parallelism. Each is a run of `training_step.py`, two of
one GPU at a time. Leaves two_gpus.csv, .json and .png, after every run: seconds, memory, efficiency (one GPU's time over twice
that of two, graphs or not, whichever is faster on one), and what the plan predicts. `--list` names the runs, `--runs` takes
some; how they go on: benchmarks/training_runs.py.

`--tiny` tries it on a CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scaling_points import Point
from training_runs import Row, Table, parser, train
from training_runs_plots import SECONDS, Panel
from training_step import RUNS, command, on_cpu, said

from megatron_lighthouse.context_parallel.schemes import SWITCH
from megatron_lighthouse.lighthouse.config import LighthouseConfig
from megatron_lighthouse.plan.calibration import coefficients
from megatron_lighthouse.plan.device import DEVICES
from megatron_lighthouse.plan.time import tokens_per_gpu

ARGUMENTS = {"dense": RUNS["dense"], "lighthouse": RUNS["lighthouse, first and last two layers dense"]}
GRAPHS = "--cuda-graph-impl"
DOCUMENTS = ("--dataloader-inter-document-masking",)
TENSOR = ("--context-parallel-size", "1", "--tensor-model-parallel-size", "2", "--sequence-parallel")


@dataclass(frozen=True)
class Run:
    """A training run."""

    attention: str
    tokens: int
    gpus: int
    how: str = ""
    more: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    steps: int = 10

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.attention, str(self.tokens), f"{self.gpus}gpu", self.how)))

    @property
    def title(self) -> Row:
        return {"attention": self.attention, "tokens": self.tokens, "GPUs": self.gpus, "how": self.how or "eager"}

    def found(self, log: str) -> Row:
        return {**said(log, self.tokens), "predicted": round(self.predicted, 3) if self.plain else None}

    @property
    def plain(self) -> bool:
        """Whether the plan knows it: of one document."""
        return DOCUMENTS[0] not in self.more

    def command(self, out: Path, tiny: bool) -> list[str]:
        """What trains it, its data in `out`."""
        budget = 0 if DOCUMENTS[0] in self.more else self.tokens // 64  # each document has one by its length
        sizes = {"out": out, "seq_length": self.tokens, "layers": 30, "ranks": self.gpus, "budget": budget, "steps": self.steps}
        if tiny:
            sizes |= {"seq_length": self.tokens // 128, "layers": 6, "budget": budget and 8}
        words = command(ARGUMENTS[self.attention], argparse.Namespace(**sizes), [*self.more])
        return on_cpu(words) if tiny else words

    @property
    def predicted(self) -> float:
        """Seconds a step on H200s, by the plan."""
        context, tensor = (1, self.gpus) if set(TENSOR) <= {*self.more} else (self.gpus, 1)
        config = LighthouseConfig(3, 4, self.tokens // 64)
        point = Point(self.attention, self.tokens, context, config=config, recompute="none", tensor_parallel=tensor)
        graphed = {"cuda_graph_impl": self.more[1]} if GRAPHS in self.more else {}
        run = point.run.change(device=DEVICES["h200"], options=graphed)
        return self.tokens / tokens_per_gpu(run, coefficients()) / self.gpus


def graphs(
    attention: str, tokens: int, gpus: int, how: str = "graphs", *more: str, kind: str = "local", **environment: str
) -> Run:
    unseen = ("--no-check-for-nan-in-loss-and-grad",) if kind == "full_iteration" else ()
    return Run(attention, tokens, gpus, how, (GRAPHS, kind, *unseen, *more), environment)


ALONE = [
    [
        graphs("lighthouse", 32768, 1),
        Run("lighthouse", 98304, 1),
        Run("lighthouse", 98304, 1, "documents", DOCUMENTS),
    ],
    [
        Run("dense", 32768, 1),
        graphs("lighthouse", 32768, 1, "whole graphs", kind="full_iteration"),
        Run("dense", 98304, 1, steps=6),
    ],
]
"""On the first GPU, and on the second."""
TOGETHER = [
    graphs("lighthouse", 32768, 2),
    Run("lighthouse", 98304, 2),
    Run("lighthouse", 32768, 2),
    Run("dense", 32768, 2),
    Run("dense", 98304, 2, steps=8),
    Run("lighthouse", 98304, 2, "TP documents", (*TENSOR, *DOCUMENTS)),
    graphs("lighthouse", 32768, 2, "TP graphs", *TENSOR),
    graphs("lighthouse", 98304, 2),
    Run("lighthouse", 98304, 2, "TP", TENSOR),
    graphs("lighthouse", 32768, 2, "whole graphs", kind="full_iteration"),
    graphs("lighthouse", 32768, 2, "graphs, by NCCL", **{SWITCH: "0"}),
]
"""On both, the most wanted first."""


def beside(rows: Sequence[Row]) -> None:
    """How efficient two GPUs are."""
    for row in rows:
        same = [
            one["seconds a step"]
            for one in rows
            if one["GPUs"] == 1
            and (one["attention"], one["tokens"]) == (row["attention"], row["tokens"])
            and ("documents" in one["how"]) == ("documents" in row["how"])
            and one["seconds a step"]
        ]
        known = row["GPUs"] == 2 and row["seconds a step"] and same
        row["of one GPU's time"] = round(row["seconds a step"] / min(same), 4) if known else None
        row["efficiency"] = round(min(same) / row["seconds a step"] / 2, 4) if known else None


TABLE = Table("two_gpus", beside, (SECONDS, Panel("efficiency", "of twice one GPU's speed")))


def main() -> None:
    train(parser(__doc__, TABLE).parse_args(), TABLE, ALONE, TOGETHER)


if __name__ == "__main__":
    main()
