"""What a run says of itself: each thing once, by rank 0."""

from __future__ import annotations

import logging
import os
from functools import cache

log = logging.getLogger("megatron_lighthouse")


def say_once(message: str) -> None:
    """Warn, on rank 0 alone, the first time that `message` is given. Silent in compiled code."""
    import torch  # which takes seconds, and a program that says nothing may need it for nothing

    if not torch.compiler.is_compiling():
        _say(message)


@cache
def _say(message: str) -> None:
    import torch

    begun = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not (torch.distributed.get_rank() if begun else int(os.environ.get("RANK", "0"))):
        log.warning(message)
