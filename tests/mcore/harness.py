"""Runs of the real entry point in processes of their own, on CPU over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lighthouse.plots import read_scalars
from megatron_lighthouse.recipe.presets import ON_CPU
from tests.mcore.forks import Fork
from tests.ports import free_port

ROOT = Path(__file__).parents[2]

MODEL = [
    *ON_CPU.split(),
    *"""
    --no-bias-swiglu-fusion
    --num-layers 4 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --group-query-attention
    --num-query-groups 2 --seq-length 256 --max-position-embeddings 256
    --position-embedding-type rope --normalization RMSNorm --disable-bias-linear --swiglu
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.1
    --micro-batch-size 1 --global-batch-size 2 --train-iters 3 --seed 7
    --lr 5e-3 --lr-decay-style constant --log-interval 1 --eval-interval 1000 --eval-iters 0
    --no-create-attention-mask-in-dataloader
    --lighthouse-budget 8 --lighthouse-tile-budget 4 --lighthouse-dense-first 1 --lighthouse-dense-last 1 --num-workers 0
    """.split(),
]
"""4 layers, the middle two Lighthouse: 256 tokens, 2 tiles, 80 gathered rows."""

TEXT = ["--text-data", str(ROOT / "LICENSE")]


def some_slow(names: Iterable[str], slow: Collection[str]) -> list[Any]:
    """Parameters of a test, of which `make test` leaves those in `slow` to `make test-all`."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in slow)) for name in names]


def without(words: Sequence[str], *flags: str) -> list[str]:
    """The words but for these flags and their values."""
    kept, dropped = [], False
    for word in words:
        dropped = word in flags if word.startswith("--") else dropped
        kept += [] if dropped else [word]
    return kept


@dataclass(frozen=True)
class Run:
    """What a run left behind."""

    losses: dict[int, float]
    """Loss by iteration, as the last rank logged it to TensorBoard (fp32)."""
    gradient_norms: dict[int, float]
    """Norm of the whole model's gradient by iteration."""
    log: str
    folder: Path


class Processes:
    """The ranks of one run. None outlives the object's `wait` or `kill`."""

    def __init__(
        self, folder: Path, ranks: int, arguments: Sequence[str], module: str = "megatron_lighthouse.pretrain_gpt"
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "log.txt"
        environment = {
            **os.environ,
            **{"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"},
            **{"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)},
        }
        start = subprocess.Popen if torch.cuda.is_available() else Fork  # a fork has no CUDA
        command = [sys.executable, "-m", module, *arguments]
        with self.log.open("w") as output:
            self.processes = [
                start(
                    command,
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=folder,
                    start_new_session=True,
                )
                for rank in range(ranks)
            ]

    def wait(self, seconds: float = 900) -> list[int]:
        """The exit statuses; -1 for a rank that had to be stopped. The first that fails takes the others with it."""
        end = time.monotonic() + seconds
        try:
            while any(process.poll() is None for process in self.processes):
                if any(process.poll() for process in self.processes) or time.monotonic() > end:
                    break
                time.sleep(0.05)
            return [-1 if process.poll() is None else process.returncode for process in self.processes]
        finally:
            self.kill()

    def kill(self) -> None:
        """SIGKILL, for every process that the ranks started too."""
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()


def run(
    folder: Path,
    *arguments: str,
    ranks: int = 1,
    data: Sequence[str] = TEXT,
    module: str = "megatron_lighthouse.pretrain_gpt",
    model: Sequence[str] = MODEL,
) -> Run:
    """Train `model` with `arguments` on `ranks` processes; fails the test, showing the log's end, if a rank fails."""
    processes = Processes(folder, ranks, [*model, *_output(folder), *arguments, *data], module)
    statuses = processes.wait()
    log = processes.log.read_text(errors="replace")
    assert not any(statuses), f"exit statuses {statuses}:\n{log[-5000:]}"
    scalars = read_scalars(folder / "tensorboard")
    losses, norms = ({int(i): float(x) for i, x in zip(*scalars[name], strict=True)} for name in ("lm loss", "grad-norm"))
    return Run(losses, norms, log, folder)


def refused(folder: Path, *arguments: str, module: str = "megatron_lighthouse.pretrain_gpt") -> str:
    """The error of a run that must fail before it starts training."""
    processes = Processes(folder, 1, [*MODEL, *_output(folder), *arguments, *TEXT], module)
    statuses = processes.wait()
    log = processes.log.read_text(errors="replace")
    assert statuses == [2], f"exit statuses {statuses}:\n{log[-5000:]}"
    return log


def _output(folder: Path) -> list[str]:
    return ["--tensorboard-dir", str(folder / "tensorboard"), "--data-cache-path", str(folder / "data")]
