"""What copies ask of a GPU: memory that its peers can write, a stream of their own, and streams that wait for each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lighthouse.context_parallel.schemes import SWITCH


class Gpu:
    """This process's GPU. A CUDA graph can hold all that it is asked but for memory."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.device = group, device
        self.stream = torch.cuda.Stream(device, priority=-1)
        self.memory: list[Tensor] = []

    def shared(self, size: int) -> Any:
        """`size` bytes of zeros on every rank, and where those of the others are: torch's handle of symmetric memory."""
        from torch.distributed import _symmetric_memory as symmetric

        torch.cuda.empty_cache()  # what follows is taken from beside torch's cache, which may hold all
        outcome: list[Any] = [None] * self.group.size()
        problem = None
        try:
            memory = symmetric.empty(size, dtype=torch.uint8, device=self.device).zero_()
        except Exception as error:
            problem = f"rank {dist.get_rank()}: {type(error).__name__}: {error}"
        dist.all_gather_object(outcome, problem, group=self.group)
        if any(outcome):  # on every rank, or the others would wait for this one
            raise RuntimeError(
                f"{size / 2**20:,.0f} MiB for messages between GPUs, beside torch's cache, cannot be had: "
                f"{next(filter(None, outcome))}. Leave more memory, or set {SWITCH}=0 in the environment: then NCCL sends them."
            )
        self.memory.append(memory)
        shared = problem = None
        try:
            with _without_multicast():
                shared = symmetric.rendezvous(memory, self.group)
            if int(shared.buffer_ptrs[self.group.rank()]) != memory.data_ptr():
                problem = f"torch {torch.__version__} puts symmetric memory elsewhere than expected"
        except Exception as error:
            problem = f"rank {dist.get_rank()}: {type(error).__name__}: {error}"
        torch.cuda.synchronize(self.device)
        dist.all_gather_object(outcome, problem, group=self.group)  # and nobody writes before all are zero
        if any(outcome):
            raise RuntimeError(
                f"Memory of another GPU: {next(filter(None, outcome))}. Set {SWITCH}=0: then NCCL sends messages."
            )
        return shared

    @contextmanager
    def copying(self) -> Iterator[None]:
        """What is done inside begins when what the current stream has been given is done, and lets it go on."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield

    def copy(self, target: Tensor, x: Tensor) -> None:
        """In the current stream. `x` is to be kept until that has been waited for."""
        target.copy_(x)

    def left(self) -> torch.cuda.Event:
        """When what the current stream has been given is done."""
        return torch.cuda.current_stream(self.device).record_event()

    def wait(self, left: torch.cuda.Event) -> None:
        """What follows in the current stream begins then, and may use anew what was copied; so a capture ends in one stream."""
        torch.cuda.current_stream(self.device).wait_event(left)

    def take(self, address: int) -> None:
        """What follows in the current stream begins when the flag at `address` is 1, and it is 0 again."""
        from cuda.bindings import driver

        flag = driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_EQ
        _check(driver.cuStreamWaitValue32(self._current(), address, 1, flag))
        self._write(address, 0)

    def give(self, address: int) -> None:
        """The flag becomes 1 when what the current stream has been given is done and seen by all GPUs."""
        self._write(address, 1)

    def _write(self, address: int, value: int) -> None:
        from cuda.bindings import driver

        flag = driver.CUstreamWriteValue_flags.CU_STREAM_WRITE_VALUE_DEFAULT
        _check(driver.cuStreamWriteValue32(self._current(), address, value, flag))

    def _current(self) -> int:
        return torch.cuda.current_stream(self.device).cuda_stream


@contextmanager
def _without_multicast() -> Iterator[None]:
    """torch would set up NVLink multicast too, which nothing here uses and which has failures of its own."""
    name = "TORCH_SYMM_MEM_DISABLE_MULTICAST"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def refuse_in_capture() -> None:
    """Where ranks would have to agree, or to take memory, while a CUDA graph is captured.

    Raises:
        RuntimeError: there.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a layer over shards must be called with inputs of this size before a CUDA graph captures it.")


def _check(result: tuple[Any, ...]) -> None:
    if result[0].value:
        raise RuntimeError(f"CUDA refuses a stream memory operation: {result[0].name}")
