"""What runs have of this machine: Megatron's arguments for it, and GPUs. Imports no Megatron. Ours."""

from __future__ import annotations

import itertools
import os
import platform
from collections.abc import Mapping
from importlib.util import find_spec

import torch

from megatron_lighthouse.recipe.presets import LOCAL, ON_CPU


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


def shared_out(runs: Mapping[str, int], at_once: int, gpus: int | None = None) -> dict[str, list[int]]:
    """Of each run the GPUs that it has: the first ones, or in turn where runs of one GPU are side by side.

    Args:
        runs: the ranks of each.
        at_once: of one, each has the first GPU, so that their times compare.
        gpus: all that can be seen, by default.
    """
    gpus = torch.cuda.device_count() if gpus is None else gpus
    turns = itertools.count()
    alone = at_once == 1 or gpus < 2
    return {name: list(range(ranks)) if alone or ranks > 1 else [next(turns) % gpus] for name, ranks in runs.items()}


def seeing(gpus: list[int]) -> dict[str, str]:
    """The environment of a process that is to see these of the GPUs that can be seen here."""
    if not torch.cuda.is_available():
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    return {"CUDA_VISIBLE_DEVICES": ",".join(visible.split(",")[i] for i in gpus)}


def hardware(gpus: list[int]) -> tuple[str, str]:
    """The name of the device that a run has here, and the UUIDs of its GPUs; of a CPU no UUID."""
    if not torch.cuda.is_available():
        return platform.machine(), ""
    return torch.cuda.get_device_name(), " ".join(str(torch.cuda.get_device_properties(i).uuid) for i in gpus)


def and_also(known: str | None, new: str) -> str:
    """`new` after what is known, once."""
    return new if not known or known == new else known if new in known.split(", ") else f"{known}, {new}"
