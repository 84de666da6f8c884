"""The command lines of runs: training and evaluations, by the product's own modules. Imports no Megatron. Ours."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from experiments.run import Run
from experiments.runs import Size, attention_arguments, lighthouse_arguments, model_arguments
from megatron_lighthouse.launch.torchrun import torchrun
from megatron_lighthouse.recipe.probes import PROBES

SAVES = 2
"""Checkpoints a run, and one at each switch."""


@dataclass(frozen=True)
class Commands:
    """What the runs of one --work folder share."""

    size: Size
    of_machine: list[str]
    """Megatron's arguments for this machine."""
    more: list[str]
    """Arguments of the command line that go to Megatron, in all runs."""
    probes: list[str]
    """Arguments of the evaluation."""
    foresight: list[str]
    """Arguments of the evaluation at the switch."""

    def arguments(self, run: Run) -> list[str]:
        """What a run is trained and evaluated with, wherever its files are."""
        model, attention = model_arguments(run, self.size, self.of_machine), attention_arguments(run, self.size)
        return [*model, *attention, *self.more, *self.probes, *self.foresight]

    def of(self, run: Run, folder: Path, corpus: Path) -> dict[str, list[str]]:
        """Of a run with its files in `folder`: 'train', and 'evaluate' and 'hindsight' where it has them."""
        commands = {"train": self.training(run, folder, corpus)}
        if not run.until:
            commands["evaluate"] = self.evaluation(run, folder, corpus)
        if run.hindsight:
            commands["hindsight"] = self.hindsight(run, folder, corpus)
        return commands

    def training(self, run: Run, folder: Path, corpus: Path) -> list[str]:
        checkpoints = str(folder / "checkpoints")
        python = torchrun(run.ranks) if run.ranks > 1 else [sys.executable]
        # Megatron's index files are not written whole, so processes side by side have each their own
        data = folder / "data"
        return [
            *(*python, "-m", "megatron_lighthouse.pretrain_gpt"),
            *model_arguments(run, self.size, self.of_machine),
            *(*attention_arguments(run, self.size), *self.more),
            *("--save", checkpoints, "--load", checkpoints, "--save-interval", str(max(1, self.size.steps // SAVES))),
            *("--tensorboard-dir", str(folder / "tensorboard"), "--data-cache-path", str(data)),
            *("--text-data", str(corpus / "train"), "--exit-signal-handler"),
        ]

    def evaluation(self, run: Run, folder: Path, corpus: Path) -> list[str]:
        """Of the last checkpoint, with dense attention or that of a run without Lighthouse."""
        length = str(self.size.evaluated)
        how = (
            ["--seq-length", length, "--max-position-embeddings", length] if self.size.evaluated > self.size.seq_length else []
        )
        attention = "dense" if run.share else run.attention
        return self._measured(run, folder, corpus, "evaluation", [*how, "--attention", attention, *self.probes])

    def hindsight(self, run: Run, folder: Path, corpus: Path) -> list[str]:
        """Of the checkpoint at the switch, with Lighthouse attention."""
        at = ["--ckpt-step", str(run.switch(self.size.steps)), "--loss-sequences", "0"]
        at += [word for probe in PROBES for word in (f"--{probe.name}-samples", "0")]
        how = [*lighthouse_arguments(run, self.size), *at, *self.foresight]
        return self._measured(run, folder, corpus, "hindsight", how)

    def _measured(self, run: Run, folder: Path, corpus: Path, into: str, how: list[str]) -> list[str]:
        return [
            *(sys.executable, "-m", "megatron_lighthouse.recipe.evaluate"),
            *(*model_arguments(run, self.size, self.of_machine), *how, *self.more),
            *("--load", str(folder / "checkpoints"), "--held-out", str(corpus / "held-out"), "--out", str(folder / into)),
        ]
