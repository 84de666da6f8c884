"""Models that are known by name, and their runs on so many GPUs."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from typing import Any

from megatron_lighthouse.lighthouse.config import LighthouseConfig
from megatron_lighthouse.plan.model import GPT
from megatron_lighthouse.plan.run import Run

STEP_TOKENS = 2**22
"""Tokens of a step where no batch is given: Llama 3's first stage took as many (arXiv 2407.21783, section 3.4.1)."""
ALONE = {"tensor_parallel": 1, "context_parallel": 1, "pipeline_parallel": 1, "cp_comm_type": "p2p"}
"""The layout of a sequence that one GPU has."""
MORE = (2, 4, 8, 16)
"""Times as many GPUs that the table of docs/models.md tries where both stages fit none of the layouts."""


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
    run.change(**ALONE, gpus=1, global_batch=1).check()
