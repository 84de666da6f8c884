"""What benchmarks/quality.py trains: the models, the runs, and the arguments that they come to. Imports no Megatron. Ours."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from megatron_lighthouse.recipe.presets import COMMON, LOCAL, ON_CPU

REFERENCE = "dense"
WARM_UP = 0.05
"""Share of the iterations in which the learning rate rises."""
GRADUAL = 20
"""The gradual return takes one iteration in so many."""


@dataclass(frozen=True)
class Model:
    """A GPT over bytes, and the Lighthouse settings that go with it."""

    arguments: str
    seq_length: int
    steps: int
    batch: int
    """Sequences an iteration, all in one micro batch."""
    budget: int
    """k is the sequence length over this."""
    tile_budget: int


MODELS = {
    # 39M parameters. As many layers are Lighthouse as in the paper's model, 10 of 12 there being 26 of 30: with the default,
    # two dense layers at either end, a third of this shallow model would never select anything
    "40m": Model(
        """
        --num-layers 12 --hidden-size 512 --ffn-hidden-size 1408 --num-attention-heads 8 --rotary-base 500000
        --lr 1e-3 --min-lr 1e-4
        """,
        # two sequences at once: with one the host, not the GPU, sets the pace of so small a model's Lighthouse iterations
        *(32768, 800, 2, 64, 128),
    ),
    "tiny": Model(
        """
        --num-layers 4 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --init-method-std 0.1
        --lr 5e-3 --min-lr 5e-4
        """,
        *(256, 10, 1, 32, 4),
    ),
}


@dataclass(frozen=True)
class Run:
    """One training run. What is not said is as in the others."""

    title: str
    share: int = 0
    """Per cent of the iterations that use Lighthouse; the rest is dense."""
    scorer: str = "norm"
    budget: float = 1
    """Times the model's."""
    options: str = ""
    gradual: bool = False
    """Whether layers return to dense attention one by one."""
    seed: int = 1
    """Of the initial weights and of the order of the data."""
    ranks: int = 1
    """GPUs, by context parallelism."""
    telemetry: bool = False
    """Whether it logs what selection does, ten times in all. Not for a run whose time counts."""
    against: tuple[str, ...] = (REFERENCE,)
    """The runs that it is compared with."""

    def switch(self, steps: int) -> int:
        """The last iteration in which all Lighthouse layers select; 0 for a run that is dense throughout."""
        return steps * self.share // 100

    def dense_from(self, steps: int) -> int:
        """The first iteration in which all layers are dense."""
        return self.switch(steps) + (max(2, steps // GRADUAL) if self.gradual else 1)


BASE = "norm-60"
OTHERS = (REFERENCE, BASE)
"""What a variant is compared with: dense from scratch, and the recipe of which it is a variant."""
RUNS = {
    # 1. the recipe against dense from scratch
    REFERENCE: Run("dense from scratch", against=()),
    BASE: Run("60% Lighthouse, then dense", 60),
    "norm-75": Run("75% Lighthouse, then dense", 75, against=OTHERS),
    # what another seed alone changes
    "dense-2": Run("dense from scratch, second seed", seed=2),
    "norm-60-2": Run("60% Lighthouse, second seed", 60, seed=2, against=("dense-2", BASE)),
    # 2. the scorers
    "summary-60": Run("scorer summary", 60, scorer="summary", against=(*OTHERS, "dilated-60")),
    "dilated-60": Run("scorer dilated", 60, scorer="dilated", against=OTHERS),
    # 3. one thing changed
    "half-budget": Run("half the budget", 60, budget=0.5, against=OTHERS),
    "double-budget": Run("twice the budget", 60, budget=2, against=OTHERS),
    "no-pin": Run("first window not pinned", 60, options="--no-lighthouse-pin-first", against=OTHERS),
    "layers": Run("layer by layer to dense", 60, gradual=True, telemetry=True, against=OTHERS),
    "cp-2": Run("context parallel 2", 60, ranks=2, against=OTHERS),
}


@dataclass(frozen=True)
class Size:
    """What all runs of a comparison share."""

    model: str
    seq_length: int
    steps: int
    batch: int
    """Sequences an iteration."""

    @property
    def tokens(self) -> int:
        """Of an iteration."""
        return self.seq_length * self.batch


def implementation() -> list[str]:
    """Megatron's arguments for this machine: Transformer Engine where it is installed, else its local layers."""
    if not torch.cuda.is_available():
        return f"{ON_CPU} --no-bias-swiglu-fusion".split()
    arguments = ["--distributed-backend", "nccl", "--bf16"]
    if find_spec("transformer_engine"):
        arguments += ["--transformer-impl", "transformer_engine", "--attention-backend", "fused"]
    else:
        arguments += [*LOCAL.split(), "--lighthouse-inner", "cudnn"]
    if not find_spec("fused_weight_gradient_mlp_cuda"):  # an extension of NVIDIA Apex
        arguments.append("--no-gradient-accumulation-fusion")
    return arguments


def hardware(ranks: int) -> tuple[str, str]:
    """The name of the device that a run of so many ranks has here, and the UUIDs of its GPUs; of a CPU no UUID."""
    if not torch.cuda.is_available():
        return platform.machine(), ""
    return torch.cuda.get_device_name(), " ".join(str(torch.cuda.get_device_properties(i).uuid) for i in range(ranks))


def and_also(known: str | None, new: str) -> str:
    """`new` after what is known, once."""
    return new if not known or known == new else known if new in known.split(", ") else f"{known}, {new}"


def model_arguments(run: Run, size: Size, of_machine: list[str]) -> list[str]:
    """Model, optimizer and schedule: what a run and the evaluation of its checkpoint are both given."""
    length = str(size.seq_length)
    return [
        *(*COMMON.split(), *of_machine, *MODELS[size.model].arguments.split()),
        *("--seq-length", length, "--max-position-embeddings", length, "--global-batch-size", str(size.batch)),
        *("--micro-batch-size", str(size.batch)),
        *("--train-iters", str(size.steps), "--lr-warmup-fraction", str(WARM_UP), "--seed", str(run.seed)),
        # COMMON asks for validation, whose text is not the evaluation's
        *("--eval-iters", "0", "--eval-interval", str(size.steps + 1)),
    ]


def attention_arguments(run: Run, size: Size) -> list[str]:
    """Which attention, from which iteration on, over how many GPUs."""
    if not run.share:
        return ["--attention", "dense"]
    model, at = MODELS[size.model], run.switch(size.steps)
    arguments = [
        *("--attention", "lighthouse", "--lighthouse-levels", "3", "--lighthouse-pooling", "4"),
        *("--lighthouse-budget", str(round(size.seq_length / model.budget * run.budget))),
        *("--lighthouse-tile-budget", str(model.tile_budget), "--lighthouse-scorer", run.scorer),
        *("--lighthouse-dense-first", "1", "--lighthouse-dense-last", "1"),
        *("--lighthouse-stage2-at", str(at), *run.options.split()),
    ]
    if run.gradual:
        arguments += ["--lighthouse-return", "layers", "--lighthouse-return-iters", str(run.dense_from(size.steps) - at)]
    if run.telemetry:
        arguments += ["--lighthouse-telemetry-interval", str(size.steps // 10)]
    if run.ranks > 1:
        arguments += ["--context-parallel-size", str(run.ranks), "--high-priority-stream-groups", "cp"]
    return arguments


def check(names: list[str], size: Size) -> None:
    """Refuse, before work starts, what cannot run.

    Raises:
        ValueError: the option, its value, and what would work.
    """
    for option, value in (("--steps", size.steps), ("--seq-length", size.seq_length), ("--batch", size.batch)):
        if value < 1:
            raise ValueError(f"{option} {value} must be at least 1.")
    if size.steps < 10:
        raise ValueError(f"--steps {size.steps} leaves stages of no length: use at least 10.")
    gpus = torch.cuda.device_count()
    for name in names:
        if torch.cuda.is_available() and RUNS[name].ranks > gpus:
            raise ValueError(f"--runs {name} needs {RUNS[name].ranks} GPUs, and {gpus} can be seen: leave it out here.")
