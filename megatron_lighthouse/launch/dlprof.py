"""NVIDIA DLProf, where the launch scripts' `--profile dlprof` asks for it: an optional shim. Its last release was in 2021."""

from __future__ import annotations

import os
from importlib import import_module


def start() -> None:
    """Let DLProf mark torch's operations with NVTX, beside the ranges of `megatron_lighthouse.ranges`.

    Does nothing unless the launch script set LIGHTHOUSE_PROFILER=dlprof and chose this rank.

    Raises:
        ImportError: DLProf's module is not there.
    """
    ranks = os.environ.get("LIGHTHOUSE_PROFILER_RANKS", "0").split()
    if os.environ.get("LIGHTHOUSE_PROFILER") == "dlprof" and os.environ.get("RANK", "0") in ranks:
        import_module("nvidia_dlprof_pytorch_nvtx").init()
