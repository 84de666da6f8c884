"""Models that are known by name, their runs on so many GPUs, and the layout that suits both stages."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from typing import Any

from megatron_lighthouse.lighthouse.config import LighthouseConfig
from megatron_lighthouse.plan import lengths
from megatron_lighthouse.plan.coefficients import Coefficients
from megatron_lighthouse.plan.model import GPT
from megatron_lighthouse.plan.run import Run
from megatron_lighthouse.plan.search import Ranking, rank

STEP_TOKENS = 2**22
"""Tokens of a step where no batch is given: Llama 3's first stage took as many (arXiv 2407.21783, section 3.4.1)."""
MORE = (2, 4, 8, 16)
"""Times as many GPUs that are tried where both stages fit none of the layouts."""


def models() -> dict[str, dict[str, Any]]:
    """The tables of models.toml, by name."""
    return tomllib.loads((files("megatron_lighthouse.plan") / "models.toml").read_text())


def run_of_model(name: str, seq_length: int, lighthouse: dict[str, Any] | None = None, **changes: Any) -> Run:
    """A run of the model, on one GPU, with `changes`, and the pyramid of its length with the fields of `lighthouse`.

    Raises:
        ValueError: a model that is not known, or that the plan does not count.
    """
    known = models()
    if name not in known:
        raise ValueError(f"--model {name!r} is not known: use {' or '.join(known)}, or --recipe FILE.")
    table = known[name]
    if what := table.get("not_counted"):
        raise ValueError(f"--model {name} has {' and '.join(what)}, which is not counted by the plan.")
    config = LighthouseConfig.for_length(seq_length, **{**table.get("lighthouse", {}), **(lighthouse or {})})
    batch = max(1, STEP_TOKENS // max(1, seq_length))
    own = {"config": config, "global_batch": batch, "options": table.get("options", {})}
    run = Run(GPT(**table["model"]), seq_length, **{**own, **changes})
    check_model(run)
    return run


def check_model(run: Run) -> None:
    """Raises ValueError where no layout could train the model at its length."""
    alone = {"tensor_parallel": 1, "context_parallel": 1, "pipeline_parallel": 1, "gpus": 1, "cp_comm_type": "p2p"}
    run.change(**alone, global_batch=1).check()


def placed(run: Run, speed: Coefficients, fraction: float) -> Ranking:
    """The layouts of the run's GPUs that fit both its stages.

    Raises:
        ValueError: there is none; and on how many GPUs there is one.
    """
    check_model(run)
    found = rank(run, speed, fraction)
    if found.layouts:
        return found
    refused = ", ".join(f"{count} by {name}" for name, count in found.refused.most_common())
    more = (run.gpus * times for times in MORE)
    enough = next((gpus for gpus in more if rank(run.change(gpus=gpus), speed, fraction).layouts), None)
    use = f"--gpus {enough}" if enough else "another batch or number of GPUs"
    longest = lengths.of_gpus(run, fraction)
    shorter = f"--seq-length {longest.seq_length}" if longest else "a shorter --seq-length"
    raise ValueError(
        f"--gpus {run.gpus}: no layout fits both stages of {run.seq_length:,} tokens and {run.global_batch} sequences a step "
        f"(refused: {refused}): use {use}, or {shorter}."
    )
