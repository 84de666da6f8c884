"""What a test file may not leave behind in its process: a worker runs others after it, in an order that nobody chooses."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

import torch

NOTED = ("PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR", "TORCHDYNAMO_DISABLE", "CUDA_DEVICE_MAX_CONNECTIONS")
"""By pytest and torch, and by the stand-in for CUDA, which stays."""


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in NOTED}


def signals() -> dict[int, Any]:
    return {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGURG)}


def restore(before: dict[str, str], handlers: dict[int, Any]) -> None:
    """The environment, where Megatron's models and libraries write, and what commands do with signals: forks inherit both."""
    for name in environment().keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def state() -> dict[str, Any]:
    """All that tests have been seen to change, or might."""
    cuda = torch.backends.cuda
    return {
        **environment(),
        "folder": os.getcwd(),
        "command line": [*sys.argv],
        "signals": signals(),
        "logging": (logging.root.level, logging.root.manager.disable),
        "torch's defaults": (torch.get_default_dtype(), torch.get_default_device()),
        "determinism": (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "torch's attention": (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()),
        "process groups": torch.distributed.is_initialized(),
        "Megatron's arguments": _global_args(),
        "hooks": [f"{owner.__name__}.{name}" for owner, name, _ in hooks()],
        "attentions and scorers": _registered(),
    }


def hooks() -> Iterator[tuple[Any, str, Any]]:
    """What is wrapped in Megatron by loop/hooks.py, which no other file does: its owner, its name, and what was there."""
    if not (ours := sys.modules.get("megatron_lighthouse.mcore.loop.hooks")):
        return
    modules = [x for x in vars(ours).values() if isinstance(x, ModuleType) and x.__name__.startswith("megatron.")]
    classes = [x for module in modules for x in vars(module).values() if isinstance(x, type)]
    for owner in (*modules, *classes):
        for name, inner in [*vars(owner).items()]:
            if isinstance(inner, FunctionType) and ours.MARK in vars(inner):
                while ours.MARK in vars(inner):
                    inner = inner.__wrapped__
                yield owner, name, inner


def unhook() -> None:
    for owner, name, inner in hooks():
        setattr(owner, name, inner)


def _global_args() -> Any:
    known = sys.modules.get("megatron.training.global_vars")
    return known and known._GLOBAL_ARGS


def _registered() -> list[str]:
    from megatron_lighthouse.lighthouse.scorers import SCORERS
    from megatron_lighthouse.variants import VARIANTS

    return [*VARIANTS, *SCORERS]
