"""`python benchmarks/layouts.py --gpus 4 --out FOLDER`: training steps of launch/'s recipes over all GPUs of a machine.

On four the 530M model's layers at 1,048,576 tokens with budgets for edge layers, with all Lighthouse alike, and 26 of 30;
Qwen3-0.6B at 1,048,576 and 4,194,304, and dense; the 530M layers at 98,304, four sequences a step, by TP 2 and by PP 2, each
with CP 2 and every `--cp-comm-type`. On eight (`--gpus 8`) Qwen3-8B at 1,048,576 by its recipe, with budgets for edge layers,
by other layouts, and dense. 530M models read text by bytes, the others random tokens of their whole vocabulary.

Leaves layouts.csv, .json (every loss too) and .png after every run: seconds, tokens a second and GPU, memory, and beside them
what the plan predicts of the same words, for H200s; how many times as fast as dense; and the place among the layouts of a run,
measured and by the plan. `--list` names the runs, `--runs` takes some of them; how they go on: benchmarks/training_runs.py.

`--tiny` tries it on a CPU, as many processes over gloo.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from million import GPU, VOCABULARY, prepare
from model_steps import RANDOM, TIMED, without
from model_steps import TINY as SMALL
from training_runs import Row, Table, chosen, parser, train
from training_runs_plots import SECONDS, Panel
from training_step import losses, said, step_times

from megatron_lighthouse.launch.torchrun import ROOT, torchrun
from megatron_lighthouse.plan import memory, time
from megatron_lighthouse.plan.calibration import coefficients
from megatron_lighthouse.plan.device import DEVICES
from megatron_lighthouse.plan.run import Run as Planned
from megatron_lighthouse.plan.words import layout_words, recipe_words, run_of_words
from megatron_lighthouse.recipe.presets import default_text

MILLION = 2**20
ATTENTION = {
    "dense": "--attention dense",
    "all layers": "--lighthouse-dense-first 0 --lighthouse-dense-last 0",
    "edge budgets": "--lighthouse-dense-first 2 --lighthouse-dense-last 2 --lighthouse-edge-budget 8192",
    "dense edges": "--lighthouse-dense-first 2 --lighthouse-dense-last 2",
}
"""Instead of the recipe's."""
OWN = ("--recompute-", "--save-", "--sequence-parallel", "--lighthouse-dense-")
"""What a run says in place of its recipe."""
SHORTER, SHORTEST = 2048, 512
"""How much shorter the sequences of --tiny are, and their tokens at least: whole chunks for eight ranks."""
TINY = f"{SMALL} --group-query-attention --num-attention-heads 8 --num-query-groups 4 --kv-channels 16 --num-layers 6"
H200 = DEVICES["h200"]
FEW = 512
"""Rows of a tiny vocabulary."""


@dataclass(frozen=True)
class Layout:
    """A recipe's training run, by one layout."""

    recipe: str
    attention: str
    tensor: int
    pipeline: int
    context: int
    scheme: str = "p2p"
    tokens: int = MILLION
    """Of a sequence."""
    batch: int = 1
    """Sequences a step."""
    steps: int = 6
    recompute: str = "full"
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def gpus(self) -> int:
        return self.tensor * self.pipeline * self.context

    @property
    def layout(self) -> str:
        sizes = {"TP": self.tensor, "PP": self.pipeline, "CP": self.context}
        return " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1) + f" {self.scheme}"

    @property
    def name(self) -> str:
        return f"{self.recipe} {self.attention} {self.tokens} {self.layout}"

    @property
    def text(self) -> bool:
        """Whether it reads text by bytes, as the scaling study's runs do: its vocabulary is theirs."""
        return self.recipe.startswith("530m")

    @property
    def warm(self) -> int:
        """First steps that are not counted: three, or of few long ones half."""
        return 3 if self.steps > 5 else self.steps // 2

    @cached_property
    def words(self) -> list[str]:
        """What model and layout are, for Megatron and the plan. Where a flag stands twice, the last counts."""
        recipe = recipe_words(ROOT / "launch" / "recipes" / f"{self.recipe}.args")
        length = str(self.tokens)
        sizes = ["--seq-length", length, "--max-position-embeddings", length, "--global-batch-size", str(self.batch)]
        layout = {"tensor_parallel": self.tensor, "pipeline_parallel": self.pipeline, "context_parallel": self.context}
        run = run_of_words([*recipe, *sizes], H200).change(**layout, cp_comm_type=self.scheme, recompute=self.recompute)
        return [*without(recipe, OWN), *sizes, *layout_words(run).split(), *ATTENTION[self.attention].split()]

    @cached_property
    def planned(self) -> Planned:
        """As the plan knows it."""
        data = ["--text-data", "bytes"] if self.text else []
        return run_of_words([*self.words, *data], H200, self.gpus).check()

    def command(self, out: Path, tiny: bool) -> list[str]:
        """What trains it, in `out` its data, and beside it random tokens."""
        words = [*self.words, *TIMED, "--train-iters", str(self.steps), "--high-priority-stream-groups", "cp"]
        if tiny:
            length = str(max(SHORTEST, self.tokens // SHORTER))
            edge = ["--lighthouse-edge-budget", "16"] if "--lighthouse-edge-budget" in words else []
            words = [*without(words, ("--bf16", "--mlp-tile-tokens", "--padded-vocab-size")), *TINY.split(), *edge]
            words += ["--seq-length", length, "--max-position-embeddings", length]
        else:
            words += [*GPU.split(), "--attention-backend", "fused"]
        if self.text:
            data = ["--text-data", *default_text()]
        else:
            data = [*RANDOM, "--vocab-size", str((FEW if tiny else VOCABULARY) - 1), "--data-path", str(out.parent / "random")]
        words += ["--data-cache-path", str(out / "data"), *data]
        return [*torchrun(self.gpus), "-m", "megatron_lighthouse.pretrain_gpt", *words]

    @property
    def predicted(self) -> float:
        """Seconds a step, by the plan."""
        return self.tokens * self.batch / self.gpus / time.tokens_per_gpu(self.planned, coefficients())

    @property
    def title(self) -> Row:
        of = {"recipe": self.recipe, "attention": self.attention, "tokens": self.tokens, "sequences": self.batch}
        return of | {"GPUs": self.gpus, "layout": self.layout}

    def found(self, log: str) -> Row:
        """What its log says, and the plan."""
        row = said(log, self.tokens * self.batch, self.warm)
        times, each = step_times(log), row["tokens a second"]
        row |= {"tokens a second and GPU": round(each / self.gpus) if each else None, "first step": times[0] if times else None}
        row |= {"predicted": round(self.predicted, 3), "predicted GiB": round(memory.total(self.planned) / 2**30, 1)}
        return row | {"losses": losses(log)}


FOUR = [
    *(Layout("530m-1m", attention, 1, 1, 4) for attention in ("edge budgets", "all layers")),
    Layout("530m-1m", "dense edges", 1, 1, 4, steps=4),
    Layout("qwen3-0.6b-1m-1gpu", "all layers", 1, 1, 4),
    Layout("qwen3-0.6b-1m-1gpu", "all layers", 1, 1, 4, tokens=4 * MILLION, steps=4),
    *(
        Layout("530m-98k", "dense edges", tensor, pipeline, 2, scheme, 98304, 4, recompute="none")
        for scheme in ("a2a", "all_gather", "p2p")
        for tensor, pipeline in ((2, 1), (1, 2))
    ),
    Layout("qwen3-0.6b-1m-1gpu", "dense", 1, 1, 4, steps=2),
]
QWEN3_8B = "qwen3-8b-1m-8gpu"
EIGHT = [
    *(Layout(QWEN3_8B, attention, 2, 1, 4, steps=10) for attention in ("all layers", "edge budgets")),
    *(Layout(QWEN3_8B, "all layers", tensor, 1, context, steps=5) for tensor, context in ((1, 8), (4, 2))),
    Layout(QWEN3_8B, "dense", 2, 1, 4, steps=2),
]
RUNS = {4: FOUR, 8: EIGHT}
"""By the GPUs of a machine, the most wanted first."""
ALIKE = ("recipe", "attention", "tokens", "sequences", "GPUs")
"""What layouts of one run share."""


def beside(rows: Sequence[Row]) -> None:
    """How many times as fast as dense, and the place among the layouts of one run, of the fastest first."""
    dense = {
        (row["recipe"], row["tokens"]): row["seconds a step"] or row["first step"]
        for row in rows
        if row["attention"] == "dense"
    }
    for row in rows:
        row["times dense"] = row["place"] = row["place by the plan"] = None
        if not row["seconds a step"]:
            continue
        if theirs := dense.get((row["recipe"], row["tokens"])):
            row["times dense"] = round(theirs / row["seconds a step"], 2)
        alike = [one for one in rows if one["seconds a step"] and all(one[name] == row[name] for name in ALIKE)]
        if len(alike) > 1:
            row["place"], row["place by the plan"] = (
                1 + sum(one[name] < row[name] for one in alike) for name in ("seconds a step", "predicted")
            )


MEMORY = Panel("peak GiB", "GiB of a GPU; |: predicted", "predicted GiB")
TABLE = Table("layouts", beside, (SECONDS, MEMORY), lists=("losses",))


def main() -> None:
    made = parser(__doc__, TABLE)
    made.add_argument("--gpus", type=int, choices=RUNS, required=True, help="of the machine")
    options = made.parse_args()
    runs, there = RUNS[options.gpus], (options.out / "random.idx").is_file()
    if not (options.list or there or all(run.text for run in chosen(runs, options))):
        prepare(options.out, FEW if options.tiny else VOCABULARY)
    train(options, TABLE, [], runs)


if __name__ == "__main__":
    main()
