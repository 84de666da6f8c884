"""Ranges: what a piece of our work is called in profiles: in torch's profiler, and as an NVTX range in Nsight Systems."""

from __future__ import annotations

from contextlib import ContextDecorator
from types import TracebackType

import torch


class profiled(ContextDecorator):
    """Show as the range `lighthouse/<name>`; a context or a decorator. Leaves no trace in compiled code."""

    def __init__(self, name: str) -> None:
        self.name = f"lighthouse/{name}"
        self.open: list[torch.profiler.record_function] = []

    def __enter__(self) -> None:
        if torch.compiler.is_compiling():
            return
        if torch.cuda.is_initialized():
            torch.cuda.nvtx.range_push(self.name)
        if torch.autograd.profiler._is_profiler_enabled:
            self.open.append(torch.profiler.record_function(self.name).__enter__())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if torch.compiler.is_compiling():
            return
        if self.open:
            self.open.pop().__exit__(kind, error, trace)
        if torch.cuda.is_initialized():
            torch.cuda.nvtx.range_pop()
