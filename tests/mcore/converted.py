"""What transformers and Megatron make of converted checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy

from megatron_lighthouse.recipe.presets import ON_CPU
from tests.mcore.harness import ROOT, Processes

RUN = [
    *ON_CPU.split(),
    *"""
    --no-bias-swiglu-fusion --no-bias-gelu-fusion --seq-length 64 --micro-batch-size 1 --lr 5e-3 --lr-decay-style constant
    --train-iters 3 --log-interval 1 --eval-interval 1000 --eval-iters 0 --no-create-attention-mask-in-dataloader
    --save-interval 100
    """.split(),
]
NO_TEXT = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "256"]


def model_arguments(folder: Path) -> list[str]:
    """The words of `model.args`, as the launch scripts read them."""
    lines = (folder / "model.args").read_text().splitlines()
    return [word for line in lines if not line.startswith("#") for word in line.split()]


@cache
def _beside() -> subprocess.Popen[str]:
    """A process without the stand-in, whose imports take longer than all that it does."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-m", "tests.mcore.hf_models"], cwd=ROOT, text=True, **pipes)


def transformers(*arguments: str | Path) -> None:
    """A function of `hf_models` and what it is given."""
    process = _beside()
    assert process.stdin
    assert process.stdout
    print(json.dumps([*map(str, arguments)]), file=process.stdin, flush=True)
    assert process.stdout.readline() == "done\n", "its error is on stderr"


def start(folder: Path, module: str, *arguments: str, ranks: int = 1) -> Processes:
    return Processes(folder, ranks, [*map(str, arguments)], module)


def finish(processes: Processes) -> str:
    statuses = processes.wait()
    log = processes.log.read_text(errors="replace")
    assert not any(statuses), f"exit statuses {statuses}:\n{log[-5000:]}"
    return log


def megatron_logits(folder: Path, load: Path, tokens: Path, *arguments: str) -> Any:
    """[tokens, vocabulary] of the dense model of a checkpoint, which Megatron's own code loads."""
    out = folder / "logits.npy"
    given = [str(out), str(tokens), *RUN, *NO_TEXT, *arguments, "--load", str(load)]
    finish(start(folder, "tests.mcore.logits_of", *given))
    return numpy.load(out)
