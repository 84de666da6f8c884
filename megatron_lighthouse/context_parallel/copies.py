"""Copies: tensors straight into the memory of another GPU of this machine, by its copy engines.

NCCL's kernels take SMs. Attention kernels are one persistent block an SM, so what NCCL sends beside them costs about its own
time, which a copy engine does not. Each rank has two slots a channel in memory that its peers can write (torch's symmetric
memory). The sender writes the tensors, then a counter, for which the receiver's stream waits; when that has read the slot, it
writes a counter for which the sender waits before it fills the slot anew. No kernel spins for that: it is streams that wait.

Every rank sends a message when another does, so the messages of a channel have the same numbers everywhere. What a stream waits
for has been given to its GPU before, by the order of the program, which is one on all ranks: so nobody waits for what comes
later, even where all streams share one queue (CUDA_DEVICE_MAX_CONNECTIONS=1).
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lighthouse.context_parallel.schemes import SWITCH
from megatron_lighthouse.notice import say_once

SLOTS = 2
ALIGNMENT = 256
COUNTER = 4
"""Bytes."""

_of_group: dict[dist.ProcessGroup, Copies | str] = {}


def copies_over(group: dist.ProcessGroup, device: torch.device) -> Copies | str:
    """The copies between the ranks of `group`, which all call this; or why there are none, the same on every rank."""
    if device.type != "cuda":
        return "there is no GPU"
    if group not in _of_group:
        of_ranks: list[Any] = [None] * group.size()
        dist.all_gather_object(of_ranks, (*_asked(device), device.index), group=group)
        problem = problem_of_all(of_ranks)
        _of_group[group] = problem or Copies(group.rank(), group.size(), _Gpu(group, device))
        how = f"NCCL, beside whose kernels attention is slower: {problem}" if problem else "copy engines"
        say_once(f"lighthouse: keys, values and their gradients travel by {how}.")
    return _of_group[group]


def problem_of_all(of_ranks: Sequence[tuple[str | None, str, int]]) -> str | None:
    """Why these ranks cannot, by the problem, the place and the GPU's number of each; None where they can."""
    problems, places, gpus = zip(*of_ranks, strict=True)
    if any(problems):
        return next(problem for problem in problems if problem)
    if len(set(places)) > 1:
        return "the ranks of a sequence are on several nodes, or in several containers"
    if len(set(gpus)) < len(gpus):
        return "ranks do not see each other's GPUs (CUDA_VISIBLE_DEVICES, or Slurm's --gpus-per-task or --gpu-bind)"
    return None


def _place() -> str:
    """Equal where processes can hand each other memory: torch does it by a socket in the temporary folder, named by process."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    machine = boot.read_text() if boot.exists() else socket.gethostname()
    spaces = [os.readlink(space) for space in ("/proc/self/ns/pid", "/proc/self/ns/mnt") if os.path.islink(space)]
    return " ".join([machine, *spaces, tempfile.gettempdir()])


def _asked(device: torch.device) -> tuple[str | None, str]:
    """Why this rank cannot, and its place. Raises nothing: the others wait to hear of it."""
    try:
        return _problem(device), _place()
    except Exception as error:
        return f"rank {dist.get_rank()}: {type(error).__name__}: {error}", ""


def _problem(device: torch.device) -> str | None:
    """Why this rank cannot."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH} is 0"
    try:
        from cuda.bindings import driver
        from torch.distributed import _symmetric_memory as symmetric
    except ImportError as error:
        return f"the package {error.name} is not installed"
    backend_of = getattr(symmetric, "get_backend", None)  # not there in older torch, which has CUDA's alone
    if backend_of and (backend := backend_of(device)) not in (None, "CUDA"):
        return f"torch's symmetric memory is {backend}'s here, not CUDA's"
    able = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS
    if not driver.cuDeviceGetAttribute(able, device.index)[1]:
        return "streams cannot wait for memory here"
    others = [i for i in range(torch.cuda.device_count()) if i != device.index]
    if not all(torch.cuda.can_device_access_peer(device, i) for i in others):
        return "the GPUs cannot reach each other's memory"
    return None


@dataclass
class _Channel:
    """Slots in the memory of every rank, and counters: of messages that have arrived at it, and that it knows to be read."""

    slots: Any
    counters: Any
    room: int
    """Bytes of a slot."""
    messages: int = 0
    """Sent by this rank, and so expected by it."""
    closed: int = 0
    reader: Any = None
    """The stream that read the last message that was closed."""

    def arrived(self, at: int, by: int) -> int:
        """The address, on rank `at`, of the number of messages that have come, the last of them from `by`."""
        return int(self.counters.buffer_ptrs[at]) + COUNTER * by

    def read(self, at: int, by: int) -> int:
        """The address, on rank `at`, of the number of messages that `by` has read."""
        return self.arrived(at, by) + COUNTER * len(self.counters.buffer_ptrs)


class Copies:
    """Messages between the ranks of a group."""

    def __init__(self, rank: int, size: int, gpu: _Gpu) -> None:
        self.rank, self.size, self.gpu = rank, size, gpu
        self.channels: dict[str, _Channel] = {}

    def send(
        self, channel: str, tensors: Sequence[Tensor], to: int, by: int, shapes: Sequence[torch.Size], room: int
    ) -> Message:
        """Begin to copy contiguous `tensors` to rank `to`, and expect tensors of `shapes` and the same dtypes of rank `by`.

        Args:
            room: bytes of the largest message, the same on all ranks.
        """
        at = self._channel(channel, room + ALIGNMENT * len(tensors))
        number, at.messages = at.messages, at.messages + 1
        if at.closed < number + 1 - SLOTS:  # it would wait for this rank itself
            raise RuntimeError(f"{channel}: message {number} is sent while {at.closed} and later ones are open.")
        begin = number % SLOTS * at.room
        with self.gpu.copying():
            self.gpu.wait(at.read(self.rank, to), number + 1 - SLOTS)
            for x, target in zip(tensors, self._views(at, to, begin, [x.shape for x in tensors], tensors), strict=True):
                self.gpu.copy(target, x)
            self.gpu.write(at.arrived(to, self.rank), number + 1)
        return Message(self, at, number, by, self._views(at, self.rank, begin, shapes, tensors))

    def _views(self, at: _Channel, rank: int, begin: int, shapes: Sequence[torch.Size], like: Sequence[Tensor]) -> list[Tensor]:
        """Tensors of `shapes`, one after another from byte `begin` on in the slots of `rank`."""
        views = []
        for shape, x in zip(shapes, like, strict=True):
            views.append(at.slots.get_buffer(rank, shape, x.dtype, begin // x.element_size()))
            begin += -(-prod(shape) * x.element_size() // ALIGNMENT) * ALIGNMENT
        return views

    def _channel(self, name: str, room: int) -> _Channel:
        """The channel, its slots of `room` bytes at least: all ranks make it at the same time, and larger ones later."""
        room = -(-room // ALIGNMENT) * ALIGNMENT
        at = self.channels.get(name)
        if at is None:
            at = self.channels[name] = _Channel(self.gpu.shared(SLOTS * room), self.gpu.shared(2 * self.size * COUNTER), room)
        elif at.room < room:
            at.slots, at.room = self.gpu.shared(SLOTS * room), room
        return at


@dataclass
class Message:
    """Tensors on their way to this rank."""

    copies: Copies
    channel: _Channel
    number: int
    by: int
    tensors: list[Tensor]

    def open(self) -> list[Tensor]:
        """The tensors, for which the current stream waits."""
        self.copies.gpu.wait(self.channel.arrived(self.copies.rank, self.by), self.number + 1)
        return self.tensors

    def close(self) -> None:
        """Give the slot back, once what the current stream has been given is done. In the order in which messages came."""
        if self.number != self.channel.closed:
            raise RuntimeError(f"message {self.number} is closed before {self.channel.closed}.")
        self.channel.closed += 1
        self.channel.reader = self.copies.gpu.after(self.channel.reader)
        for rank in range(self.copies.size):
            if rank != self.copies.rank:
                self.copies.gpu.write(self.channel.read(rank, self.copies.rank), self.number + 1)


class _Gpu:
    """What copies ask of a GPU: shared memory, a stream of their own, and streams that wait for each other across GPUs."""

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
        with _without_multicast():
            shared = symmetric.rendezvous(memory, self.group)
        elsewhere = int(shared.buffer_ptrs[self.group.rank()]) != memory.data_ptr()
        torch.cuda.synchronize(self.device)
        dist.all_gather_object(outcome, elsewhere, group=self.group)  # and nobody writes before all are zero
        if any(outcome):
            raise RuntimeError(f"torch {torch.__version__} puts symmetric memory elsewhere than expected: set {SWITCH}=0.")
        return shared

    @contextmanager
    def copying(self) -> Iterator[None]:
        """What is done inside begins when what the current stream has been given is done, and lets it go on."""
        if torch.cuda.is_current_stream_capturing():  # a graph would repeat the numbers of its messages
            raise RuntimeError(f"copies between GPUs cannot be captured in a CUDA graph: set {SWITCH}=0.")
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield

    def after(self, before: torch.cuda.Stream | None) -> torch.cuda.Stream:
        """The current stream, which goes on when what the stream `before` has been given is done."""
        current = torch.cuda.current_stream(self.device)
        if before is not None and before != current:
            current.wait_stream(before)
        return current

    def copy(self, target: Tensor, x: Tensor) -> None:
        target.copy_(x)
        x.record_stream(self.stream)

    def wait(self, address: int, value: int) -> None:
        """What follows in the current stream begins when the counter at `address` is `value` or more, counted around."""
        from cuda.bindings import driver

        flag = driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ
        _check(driver.cuStreamWaitValue32(self._current(), address, value % 2**32, flag))

    def write(self, address: int, value: int) -> None:
        """The counter becomes `value` when what the current stream has been given is done and seen by all GPUs."""
        from cuda.bindings import driver

        flag = driver.CUstreamWriteValue_flags.CU_STREAM_WRITE_VALUE_DEFAULT
        _check(driver.cuStreamWriteValue32(self._current(), address, value % 2**32, flag))

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


def _check(result: tuple[Any, ...]) -> None:
    if result[0].value:
        raise RuntimeError(f"CUDA refuses a stream memory operation: {result[0].name}")
