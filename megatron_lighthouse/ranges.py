"""Ranges: what a piece of our work is called in profiles: in torch's profiler, and as an NVTX range in Nsight Systems."""

from __future__ import annotations

from contextlib import ContextDecorator
from types import TracebackType

import torch


class profiled(ContextDecorator):
    """Show as the range `lighthouse/<name>`; a context or a decorator. Leaves no trace in compiled code."""

    def __init__(self, name: str) -> None:
        self.name, self.pushed = name, False
        self.recorded: torch.profiler.record_function | None = None

    def _recreate_cm(self) -> profiled:
        return profiled(self.name)  # of each call of what it decorates: calls may be nested, or run in several threads

    def __enter__(self) -> None:
        if torch.compiler.is_compiling():
            return
        shown = "lighthouse/" + self.name
        if torch.cuda.is_initialized():
            torch.cuda.nvtx.range_push(shown)
            self.pushed = True
        if torch.autograd.profiler._is_profiler_enabled:
            self.recorded = torch.profiler.record_function(shown).__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.recorded is not None:
            self.recorded.__exit__(kind, error, trace)
        if self.pushed:
            torch.cuda.nvtx.range_pop()
