"""What is trained: experiments, their runs, and the arguments they come to. Imports no Megatron. Ours."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from experiments import qwen3, second, studies
from experiments.run import REFERENCE, Run
from megatron_lighthouse.recipe.presets import COMMON

BASE = "norm-60"
"""The recipe that is judged."""
SECOND_SEED = "dense-2"
"""The reference with another seed."""
OTHERS = (REFERENCE, BASE)
"""What a variant is compared with: dense from scratch, and the recipe of which it is a variant."""
EARLY = 300
"""Iterations of a run that ends early, and over which others are held to it."""


@dataclass(frozen=True)
class Experiment:
    """Runs that share a model, a length, a schedule and a corpus."""

    title: str
    model: str
    """Megatron's arguments: a GPT over bytes."""
    schedule: str
    """Megatron's arguments; {decay} stands for a fifth of the iterations, {rise} for a thirtieth of them."""
    seq_length: int
    steps: int
    batch: int
    """Sequences an iteration, all in one micro batch."""
    tile_budget: int
    """m."""
    runs: dict[str, Run] = field(repr=False)
    study: bool = False
    """Whether it is of attentions that are there throughout, whose runs no Lighthouse and no switch tell apart."""
    times: int = 1
    """The evaluation's sequences are so many times as long."""
    loss_sequences: int = 200
    passkey_samples: int = 20
    variables_samples: int = 0
    """Of the evaluation, if the command line does not say."""


GPT_39M = "--num-layers 12 --hidden-size 512 --ffn-hidden-size 1408 --num-attention-heads 8 --rotary-base 500000"
GPT_85M = "--num-layers 12 --hidden-size 768 --ffn-hidden-size 2048 --num-attention-heads 12 --rotary-base 500000"
GPT_14M = "--num-layers 8 --hidden-size 384 --ffn-hidden-size 1024 --num-attention-heads 6 --rotary-base 500000"
STABLE = """
    --lr 1.5e-3 --min-lr 1e-4 --lr-warmup-iters {rise}
    --lr-decay-style WSD --lr-wsd-decay-style linear --lr-wsd-decay-iters {decay}
"""
"""Constant until the last fifth: stage 2 needs high rates to recover."""

DENSE, NORM = Run("dense from scratch", against=()), Run("60% Lighthouse, then dense", 60)
PAIR = {
    REFERENCE: DENSE,
    BASE: NORM,
    # what another seed alone changes
    SECOND_SEED: Run("dense from scratch, second seed", seed=2),
    "norm-60-2": Run("60% Lighthouse, second seed", 60, seed=2, against=(SECOND_SEED, BASE)),
}
VARIANT = replace(NORM, against=OTHERS)
"""Of which the runs of 'variants' change one thing."""
FIRST = replace(VARIANT, levels=3, budget=64, dense=1)
"""The first try: the paper's levels, and the least that stays dense."""

EXPERIMENTS = {
    "recipe": Experiment(
        "dense and the recipe, two seeds, each alone on its GPU",
        *(GPT_39M, STABLE, 32768, 3000, 2, 128),
        PAIR,
    ),
    "variants": Experiment(
        "one thing changed at a time; several share a GPU, so that their times say nothing",
        *(GPT_39M, STABLE, 16384, 2700, 2, 128),
        {
            REFERENCE: DENSE,
            BASE: replace(NORM, hindsight=True),
            # what the order of sums in cuDNN's backward alone changes: nothing smaller can be told from nothing
            "norm-60-again": replace(VARIANT, title="the same again"),
            "norm-75": replace(VARIANT, title="75% Lighthouse, then dense", share=75),
            "summary-60": replace(
                VARIANT, title="scorer summary", scorer="summary", hindsight=True, against=(*OTHERS, "dilated-60")
            ),
            "dilated-60": replace(VARIANT, title="scorer dilated", scorer="dilated", hindsight=True),
            # tiles as long as the others', which decide how far ahead a selection sees
            "half-budget": replace(VARIANT, title="half the budget", budget=64, tile_budget=64),
            "double-budget": replace(VARIANT, title="twice the budget", budget=16, tile_budget=256),
            "three-levels": replace(
                VARIANT, title="three levels, half the budget", levels=3, budget=64, tile_budget=64, hindsight=True
            ),
            "no-pin": replace(VARIANT, title="first window not pinned", options="--no-lighthouse-pin-first"),
            "layers": replace(VARIANT, title="layer by layer to dense", gradual=True, telemetry=True),
            "cp-2": replace(
                VARIANT,
                title="context parallel 2, its first 300 iterations",
                ranks=2,
                until=300,
                against=(BASE, "norm-60-again"),
            ),
        },
    ),
    "second": Experiment(
        *(second.TITLE, GPT_39M, STABLE, 16384, 2700, 2, 128, second.runs((REFERENCE, DENSE), (BASE, NORM))),
        variables_samples=20,
    ),
    "large": Experiment(
        "twice as large: a run ends within half an hour, alone on its GPU",
        *(GPT_85M, STABLE, 32768, 3000, 2, 128),
        {
            REFERENCE: DENSE,
            BASE: replace(NORM, hindsight=True),
            "causal": replace(VARIANT, title="a causal selection", options=second.CAUSAL, hindsight=True),
        },
        variables_samples=20,
    ),
    "qwen3": Experiment(qwen3.TITLE, qwen3.GPT_39M, STABLE, 16384, 1500, 2, 128, qwen3.RUNS),
    "qwen3-adam": Experiment(qwen3.ADAM_TITLE, qwen3.BY_ADAM, STABLE, 16384, 3000, 2, 128, qwen3.ADAM_RUNS),
    "parallax": Experiment(
        studies.PARALLAX_TITLE, studies.GPT_39M, STABLE, 16384, 1600, 1, 128, studies.PARALLAX, study=True, passkey_samples=0
    ),
    "parallax-normed": Experiment(
        studies.NORMED_TITLE, studies.NORMED, STABLE, 16384, 1300, 2, 128, studies.PARALLAX, study=True, passkey_samples=0
    ),
    "wall": Experiment(
        studies.WALL_TITLE,
        studies.GPT_39M,
        STABLE,
        *(2048, 2000, 8, 16),
        studies.WALL,
        study=True,
        times=16,
        loss_sequences=100,
        passkey_samples=0,
    ),
    "pilot": Experiment(
        "a smaller model at 8K, ten runs side by side: which settings recover",
        *(GPT_14M, STABLE, 8192, 3000, 4, 64),
        {
            REFERENCE: DENSE,
            BASE: NORM,
            SECOND_SEED: PAIR[SECOND_SEED],
            "norm-60-outer": replace(VARIANT, title="one dense layer at either end", dense=1),
            "summary-60-outer": replace(VARIANT, title="… and the scorer summary", dense=1, scorer="summary"),
            "pairs-outer": replace(
                VARIANT, title="… and windows of two, k = N/16", dense=1, pooling=2, budget=16, tile_budget=128
            ),
            "three-levels": replace(VARIANT, title="three levels, k = N/64", levels=3, budget=64, tile_budget=32),
            "three-levels-outer": replace(FIRST, title="… and one dense layer at either end", tile_budget=32),
            "three-levels-outer-40": replace(FIRST, title="… and 40% Lighthouse", share=40, tile_budget=32),
            "three-levels-outer-wide": replace(
                FIRST, title="… and k = N/16", budget=16, tile_budget=128, against=(*OTHERS, "three-levels-outer")
            ),
        },
    ),
    "short": Experiment(
        "the first try: 800 iterations, three levels, one dense layer at either end",
        GPT_39M,
        "--lr 1e-3 --min-lr 1e-4 --lr-warmup-fraction 0.05",
        *(32768, 800, 2, 128),
        {
            **{name: replace(run, levels=3, budget=64, dense=1) for name, run in PAIR.items()},
            "norm-75": replace(FIRST, title="75% Lighthouse, then dense", share=75),
            "summary-60": replace(FIRST, title="scorer summary", scorer="summary", against=(*OTHERS, "dilated-60")),
            "dilated-60": replace(FIRST, title="scorer dilated", scorer="dilated"),
            "no-pin": replace(FIRST, title="first window not pinned", options="--no-lighthouse-pin-first"),
        },
    ),
    "tiny": Experiment(
        "a minute or two on a CPU, to see it work",
        "--num-layers 4 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --init-method-std 0.1",
        "--lr 5e-3 --min-lr 5e-4 --lr-warmup-fraction 0.05",
        *(256, 10, 1, 4),
        {
            **{name: replace(run, dense=1, hindsight=name == BASE) for name, run in PAIR.items()},
            "cp-2": replace(VARIANT, title="context parallel 2, its first five iterations", dense=1, ranks=2, until=5),
        },
    ),
}


@dataclass(frozen=True)
class Size:
    """What all runs of a comparison share."""

    experiment: str
    seq_length: int
    steps: int
    batch: int
    """Sequences an iteration."""

    @property
    def evaluated(self) -> int:
        """Tokens of a sequence of the evaluation."""
        return self.seq_length * EXPERIMENTS[self.experiment].times

    @property
    def tokens(self) -> int:
        """Of an iteration."""
        return self.seq_length * self.batch

    def last(self, run: Run) -> int:
        """The iteration in which a run ends."""
        return min(run.until or self.steps, self.steps)


def model_arguments(run: Run, size: Size, of_machine: list[str]) -> list[str]:
    """Model, optimizer and schedule: what a run and the evaluation of its checkpoint are both given."""
    length, experiment = str(size.seq_length), EXPERIMENTS[size.experiment]
    return [
        *(*COMMON.split(), *of_machine, *experiment.model.split(), *run.model.split()),
        *experiment.schedule.format(decay=size.steps // 5, rise=size.steps // 30).split(),
        *("--seq-length", length, "--max-position-embeddings", length, "--global-batch-size", str(size.batch)),
        *("--micro-batch-size", str(size.batch), "--train-iters", str(size.steps), "--seed", str(run.seed)),
        # COMMON asks for validation, whose text is not the evaluation's
        *("--eval-iters", "0", "--eval-interval", str(size.steps + 1)),
    ]


def lighthouse_arguments(run: Run, size: Size) -> list[str]:
    """The settings of Lighthouse attention."""
    tile_budget, budget = run.tile_budget or EXPERIMENTS[size.experiment].tile_budget, size.seq_length // run.budget
    edges = ["--lighthouse-edge-budget", str(run.edges * budget)] if run.edges else []
    return [
        *("--attention", "lighthouse", "--lighthouse-levels", str(run.levels), "--lighthouse-pooling", str(run.pooling)),
        *("--lighthouse-budget", str(budget), "--lighthouse-tile-budget", str(tile_budget)),
        *("--lighthouse-scorer", run.scorer, "--lighthouse-dense-first", str(run.dense)),
        *("--lighthouse-dense-last", str(run.dense), *edges, *run.options.split()),
    ]


def attention_arguments(run: Run, size: Size) -> list[str]:
    """Which attention, from which iteration to which, over how many GPUs."""
    if not run.share:
        return ["--attention", run.attention]
    at = run.switch(size.steps)
    arguments = [*lighthouse_arguments(run, size), "--lighthouse-stage2-at", str(at)]
    if run.warmup:
        arguments += ["--lighthouse-dense-warmup-iters", str(run.warmup_to(size.steps))]
    if run.gradual:
        arguments += ["--lighthouse-return", "layers", "--lighthouse-return-iters", str(run.dense_from(size.steps) - at)]
    if run.telemetry:
        arguments += ["--lighthouse-telemetry-interval", str(size.steps // 10)]
    if run.ranks > 1:
        arguments += ["--context-parallel-size", str(run.ranks), "--high-priority-stream-groups", "cp"]
    if run.until:
        arguments += ["--exit-interval", str(size.last(run))]
    return arguments


def check(names: list[str], size: Size, at_once: int = 1) -> None:
    """Refuse, before work starts, what cannot run.

    Raises:
        ValueError: the option, its value, and what would work.
    """
    runs = EXPERIMENTS[size.experiment].runs
    sizes = (("--steps", size.steps), ("--seq-length", size.seq_length), ("--batch", size.batch), ("--at-once", at_once))
    for option, value in sizes:
        if value < 1:
            raise ValueError(f"{option} {value} must be at least 1.")
    if size.steps < 10:
        raise ValueError(f"--steps {size.steps} leaves stages of no length: use at least 10.")
    gpus = torch.cuda.device_count()
    for name in names:
        if name not in runs:
            raise ValueError(f"--runs {name} is not one of --experiment {size.experiment}: {', '.join(runs)}.")
        if torch.cuda.is_available() and runs[name].ranks > gpus:
            raise ValueError(f"--runs {name} needs {runs[name].ranks} GPUs, and {gpus} can be seen: leave it out here.")
