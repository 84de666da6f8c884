"""Copies: tensors straight into the memory of another GPU of this machine, by its copy engines.

NCCL's kernels take SMs. Attention kernels are one persistent block an SM, so what NCCL sends beside them costs about its own
time. What a copy engine sends does not.

Each rank has slots and flags in memory that its peers can write (torch's symmetric memory). To take a flag is to wait until it
is 1, and to make it 0. No kernel spins for that: streams wait. A message goes so:

1. The sender's stream takes the flag that the slot is free, writes the tensors, and gives the receiver the flag that they came.
2. The receiver's stream takes that flag and reads the slot.
3. Then it gives the flag that the slot is free to the rank that fills it next.

A pass is one message a hop, in turn: in hop h each rank sends to the rank h places after it (or before it). It takes as many
flags as it gives, and leaves them all as it found them. So a CUDA graph of whole passes can be replayed, also between calls
without a graph.

Nobody waits for ever. All ranks run one program, so what a rank waits for was queued on the others before what they wait for,
even where all streams share one queue (CUDA_DEVICE_MAX_CONNECTIONS=1). A graph keeps only the order of what depends on each
other. So a message is waited for only after this rank's own one of that hop has left, and what NCCL sends in a layer (its halo)
is waited for before a message is. What a wait comes after in a layer, it then comes after in its graph too.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lighthouse.context_parallel.gpu import Gpu, refuse_in_capture
from megatron_lighthouse.context_parallel.schemes import SWITCH
from megatron_lighthouse.notice import say_once

SLOTS = 2
"""Of a channel at most: one is filled while the other is read."""
ALIGNMENT = 256
FLAG = 4
"""Bytes."""

_of_group: dict[dist.ProcessGroup, Copies | str] = {}


def copies_over(group: dist.ProcessGroup, device: torch.device) -> Copies | str:
    """The copies between the ranks of `group`, which all call this; or why there are none, the same on every rank."""
    if device.type != "cuda":
        return "there is no GPU"
    if group not in _of_group:
        refuse_in_capture()
        of_ranks: list[Any] = [None] * group.size()
        dist.all_gather_object(of_ranks, (*_asked(device), device.index), group=group)
        problem = problem_of_all(of_ranks)
        _of_group[group] = problem or Copies(group.rank(), group.size(), Gpu(group, device))
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
    """Slots in the memory of every rank, and flags: of messages that have come, and of slots elsewhere that are free."""

    slots: list[Tensor]
    """Of each rank: bytes. Kept, for torch takes 0.1 ms and more to give them."""
    flags: Any
    room: int
    """Bytes of a slot."""
    size: int
    """Ranks."""
    hop: int = 0
    """Of the last message."""
    open: set[int] = field(default_factory=set)
    """Hops of messages that are not closed."""

    def came(self, rank: int, hop: int) -> int:
        """The address of the flag of `rank` that the message of this hop has come to it."""
        return int(self.flags.buffer_ptrs[rank]) + FLAG * hop

    def free(self, rank: int, hop: int) -> int:
        """The address of the flag of `rank` that the slot is free where its message of this hop goes."""
        return self.came(rank, self.size + hop)

    def next_in_slot(self, hop: int) -> int:
        """The hop whose message comes into the same slot next, in this pass or another."""
        return hop + SLOTS if hop + SLOTS < self.size else (hop - 1) % SLOTS + 1


class Copies:
    """Messages between the ranks of a group."""

    def __init__(self, rank: int, size: int, gpu: Gpu) -> None:
        self.rank, self.size, self.gpu = rank, size, gpu
        self.channels: dict[str, _Channel] = {}

    def send(self, channel: str, tensors: Sequence[Tensor], hop: int, shapes: Sequence[torch.Size], room: int) -> Message:
        """Begin to copy contiguous `tensors` `hop` places on, and expect some of `shapes` and the same dtypes from as far back.

        Args:
            hop: 1 to C - 1, in turn, over and over; all negative in a channel whose messages go back.
            room: bytes of the largest message, the same on all ranks.

        Raises:
            RuntimeError: a message that is not this channel's next, or that no slot is free for.
        """
        at = self._channel(channel, room + ALIGNMENT * len(tensors))
        to, number = (self.rank + hop) % self.size, abs(hop)
        if number != at.hop % (self.size - 1) + 1 or len(at.open) == min(SLOTS, self.size - 1):  # it would wait for itself
            raise RuntimeError(f"{channel}: hop {hop} is sent after hop {at.hop}, while hops {sorted(at.open)} are open.")
        at.hop = number
        at.open.add(number)
        begin = (number - 1) % SLOTS * at.room
        with self.gpu.copying():
            self.gpu.take(at.free(self.rank, number))
            for x, target in zip(tensors, self._views(at, to, begin, [x.shape for x in tensors], tensors), strict=True):
                self.gpu.copy(target, x)
            self.gpu.give(at.came(to, number))
            left = self.gpu.left()
        return Message(self, at, hop, self._views(at, self.rank, begin, shapes, tensors), left, tuple(tensors))

    def _views(self, at: _Channel, rank: int, begin: int, shapes: Sequence[torch.Size], like: Sequence[Tensor]) -> list[Tensor]:
        """Tensors of `shapes`, one after another from byte `begin` on in the slots of `rank`."""
        views = []
        for shape, x in zip(shapes, like, strict=True):
            size = prod(shape) * x.element_size()
            views.append(at.slots[rank][begin : begin + size].view(x.dtype).view(shape))
            begin += -(-size // ALIGNMENT) * ALIGNMENT
        return views

    def _bytes(self, size: int) -> list[Tensor]:
        """New memory of every rank."""
        memory = self.gpu.shared(size)
        return [memory.get_buffer(rank, (size,), torch.uint8, 0) for rank in range(self.size)]

    def _channel(self, name: str, room: int) -> _Channel:
        """The channel, its slots of `room` bytes at least: all ranks make it at the same time, and larger ones later.

        Slots that were outgrown stay: graphs may go on to use them, by the same flags.
        """
        room, slots = -(-room // ALIGNMENT) * ALIGNMENT, min(SLOTS, self.size - 1)
        at = self.channels.get(name)
        if at is None:
            refuse_in_capture()
            at = _Channel(self._bytes(slots * room), self.gpu.shared(2 * self.size * FLAG), room, self.size)
            self.channels[name] = at
            for hop in range(1, slots + 1):
                self.gpu.give(at.free(self.rank, hop))
        elif at.room < room:
            refuse_in_capture()
            at.slots, at.room = self._bytes(slots * room), room
        return at


@dataclass
class Message:
    """Tensors on their way to this rank."""

    copies: Copies
    channel: _Channel
    hop: int
    tensors: list[Tensor]
    left: Any
    """When this rank's own message of the hop has left."""
    sent: tuple[Tensor, ...]
    """Kept until then."""

    def open(self) -> list[Tensor]:
        """The tensors, for which the current stream waits. Once."""
        self.copies.gpu.wait(self.left)
        self.sent = ()
        self.copies.gpu.take(self.channel.came(self.copies.rank, abs(self.hop)))
        return self.tensors

    def close(self) -> None:
        """Give the slot to who fills it next, once what the current stream has been given is done."""
        self.channel.open.remove(abs(self.hop))
        following = self.channel.next_in_slot(abs(self.hop))
        by = (self.copies.rank - (following if self.hop > 0 else -following)) % self.copies.size
        self.copies.gpu.give(self.channel.free(by, following))
