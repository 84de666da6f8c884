"""What Megatron-core's wheel asks of a machine, or gets wrong on one, and does not need to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.training import print_rank_0


def has_dataset_helpers() -> bool:
    """Whether the helper that Megatron would compile is there: the wheel ships it, but not the Makefile that would build it."""
    try:
        from megatron.core.datasets import helpers_cpp  # noqa: F401
    except ImportError:
        return False
    return True


def skip_compilation(_: Callable[[], None]) -> None:
    """In place of Megatron's compilation of the helper."""
    print_rank_0("> the dataset index builder is compiled already")
    torch.distributed.barrier()


def initialize_without_cuda(initialize: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """Around Megatron's: no GPU is needed."""
    return initialize(*args, **{"allow_no_cuda": True, **named})
