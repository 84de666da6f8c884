"""Copies between GPUs, with threads in their place: each rank is a thread, its copying stream another, in one memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from queue import Queue
from threading import Barrier, Thread
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lighthouse.context_parallel import copies as copies_module
from megatron_lighthouse.context_parallel import exchange as exchange_module
from megatron_lighthouse.context_parallel.copies import Copies, Message, _Channel, _Gpu, copies_over, problem_of_all
from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.context_parallel.parts import Part
from megatron_lighthouse.context_parallel.ring import Ring
from megatron_lighthouse.sequence.layout import Layout
from megatron_lighthouse.softmax.blocks import BLOCKS
from tests.ranks import run_ranks
from tests.tolerances import assert_close

BATCH, HEADS, GROUPS, DIM = 2, 4, 2, 8
SECONDS = 20.0


@dataclass
class World:
    """What the threads of a test share."""

    size: int
    barrier: Barrier = field(init=False)
    memory: list[list[Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.barrier = Barrier(self.size)


@dataclass
class Shared:
    """As torch's handle of symmetric memory."""

    buffers: list[Tensor]

    @property
    def buffer_ptrs(self) -> list[int]:
        return [x.data_ptr() for x in self.buffers]

    def get_buffer(self, rank: int, shape: Sequence[int], dtype: torch.dtype, offset: int) -> Tensor:
        return self.buffers[rank].view(dtype)[offset : offset + math.prod(shape)].view(shape)


class Gpu:
    """Work given to the copying stream is done by a thread, in order and late; all other at once.

    With `one_queue` that too, as where all streams share one: what waits for later work then waits for ever.
    """

    def __init__(self, rank: int, world: World, one_queue: bool) -> None:
        self.rank, self.world, self.one_queue, self.inside = rank, world, one_queue, False
        self.queue: Queue[Callable[[], None]] = Queue()
        Thread(target=self._copy_for_ever, daemon=True).start()

    def shared(self, size: int) -> Shared:
        own = torch.zeros(size, dtype=torch.uint8)
        if self.rank == 0:
            self.world.memory.append([torch.empty(0)] * self.world.size)
        self.world.barrier.wait(SECONDS)
        buffers = self.world.memory[-1]
        buffers[self.rank] = own
        self.world.barrier.wait(SECONDS)
        return Shared(buffers)

    @contextmanager
    def copying(self) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False

    def after(self, before: None) -> None:
        """All is given to one stream here."""

    def copy(self, target: Tensor, x: Tensor) -> None:
        self._give(lambda: target.copy_(x))

    def wait(self, address: int, value: int) -> None:
        counter = self._counter(address)

        def wait() -> None:
            end = time.monotonic() + SECONDS
            while int(counter) < value:
                assert time.monotonic() < end, f"rank {self.rank} waits for {value} for ever, and has {int(counter)}"
                time.sleep(1e-5)

        self._give(wait)

    def write(self, address: int, value: int) -> None:
        counter = self._counter(address)
        self._give(lambda: counter.fill_(value))

    def _counter(self, address: int) -> Tensor:
        for shared in self.world.memory:
            for memory in shared:
                if 0 <= (offset := address - memory.data_ptr()) < memory.nbytes:
                    return memory.view(torch.int32)[offset // 4]
        raise AssertionError("an address that nobody has")

    def _give(self, work: Callable[[], Any]) -> None:
        if self.inside and not self.one_queue:
            self.queue.put(work)
        else:
            work()

    def _copy_for_ever(self) -> None:
        with torch.no_grad():
            while True:
                self.queue.get()()


class Slow:
    """An attention whose rank 0 falls behind."""

    def __init__(self, rank: int) -> None:
        self.rank, self.block = rank, BLOCKS["sdpa"](0.3)

    def forward(self, *args: Any) -> Any:
        time.sleep(0 if self.rank else 0.01)
        return self.block.forward(*args)

    def output(self, part: Part) -> Tensor:
        return self.block.output(part)

    def backward(self, *args: Any) -> Any:
        time.sleep(0 if self.rank else 0.01)
        return self.block.backward(*args)


@pytest.mark.parametrize("one_queue", [False, True])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_ring_by_copies_equals_one_rank(size: int, one_queue: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of different lengths one after another: slots are used again, and made anew for longer ones."""
    world = World(size)
    copies = [Copies(rank, size, Gpu(rank, world, one_queue)) for rank in range(size)]  # type: ignore[arg-type]
    monkeypatch.setattr(exchange_module, "copies_over", lambda group, device: copies[group])
    cases = [_case(n, seed) for seed, n in enumerate([24, 72, 24, 48, 72])]

    def of_rank(rank: int) -> list[list[Tensor]]:
        exchange: Any = Exchange(rank, Layout(size, rank))  # type: ignore[arg-type]
        attend = Ring(Slow(rank), exchange)
        outs = []
        for *qkv, grad in cases:
            query, key, value = (exchange.own(x).requires_grad_() for x in qkv)
            out = attend((query,), (key, value))
            outs.append([out.detach(), *torch.autograd.grad(out, (query, key, value), exchange.own(grad))])
        return outs

    with ThreadPoolExecutor(size) as pool:
        found = list(pool.map(of_rank, range(size)))
    layout: Any = Exchange(0, Layout(size, 0))  # type: ignore[arg-type]
    for number, case in enumerate(cases):
        for part, expected in enumerate(_attention(*case)):
            whole = layout.in_order(torch.stack([found[rank][number][part] for rank in range(size)]))
            assert_close(whole, expected, "float64")


@pytest.mark.parametrize(
    ("of_ranks", "problem"),
    [
        ([(None, "a", 0), (None, "a", 1)], None),
        ([(None, "a", 0), ("no package", "a", 1)], "no package"),
        ([(None, "a", 0), (None, "b", 1)], "several nodes"),
        ([(None, "a", 0), (None, "a", 0)], "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_ranks_agree_on_why_they_cannot(of_ranks: list[tuple[str | None, str, int]], problem: str | None) -> None:
    found = problem_of_all(of_ranks)
    assert found is problem if problem is None else problem in str(found)


def test_messages_out_of_order_are_refused() -> None:
    """A rank that would wait for itself, or give back a slot that is still read, must not go on in silence."""
    copies = Copies(0, 1, Gpu(0, World(1), one_queue=False))  # type: ignore[arg-type]
    x = torch.zeros(4)
    first, second = (copies.send("keys", [x], 0, 0, [x.shape], x.nbytes) for _ in range(2))
    with pytest.raises(RuntimeError, match="message 1 is closed before 0"):
        second.close()
    with pytest.raises(RuntimeError, match="message 2 is sent while 0"):
        copies.send("keys", [x], 0, 0, [x.shape], x.nbytes)
    first.close()


def test_slots_are_given_back_in_order_from_several_streams() -> None:
    """Else the counter of a later message would tell the sender that an earlier one has been read too."""
    current: list[Any] = [mock.Mock(name="one"), mock.Mock(name="another")]
    gpu = object.__new__(_Gpu)
    gpu.device = torch.device("cpu")
    copies = Copies(0, 2, gpu)
    at = _Channel(None, SimpleNamespace(buffer_ptrs=[0, 64]), 0)
    messages = [Message(copies, at, number, 1, []) for number in range(3)]
    one, another = current
    with mock.patch.object(_Gpu, "write"), mock.patch.object(torch.cuda, "current_stream") as stream:
        for message, stream.return_value in zip(messages, (one, another, another), strict=True):
            message.close()
    assert not one.wait_stream.called
    another.wait_stream.assert_called_once_with(one)


def cannot_ask_on_one_rank(group: dist.ProcessGroup) -> str:
    """Why each rank has no copies where the second of two cannot even ask its driver."""

    def missing(device: torch.device) -> None:
        if dist.get_rank() == 1:
            raise RuntimeError('Function "cuDeviceGetAttribute" not found')

    with mock.patch.object(copies_module, "_problem", missing):
        return str(copies_over(group, torch.device("cuda", dist.get_rank())))


def test_no_rank_waits_for_one_that_cannot_ask() -> None:
    for said in run_ranks(2, cannot_ask_on_one_rank):
        assert said == 'rank 1: RuntimeError: Function "cuDeviceGetAttribute" not found'


def _case(length: int, seed: int) -> list[Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    heads = (HEADS, GROUPS, GROUPS, HEADS)
    return [torch.randn(length, BATCH, n, DIM, dtype=torch.float64, generator=numbers) for n in heads]


def _attention(query: Tensor, key: Tensor, value: Tensor, grad: Tensor) -> list[Tensor]:
    """Output and gradients of one rank, by torch's own attention."""
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    q, k, v = (x.permute(1, 2, 0, 3) for x in leaves)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    out = out.permute(2, 0, 1, 3)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def no_room_on_one_rank(group: dist.ProcessGroup) -> str:
    """What each rank says where the second of two has no memory left; a rendezvous would wait for it."""
    from torch.distributed import _symmetric_memory as symmetric

    def empty(size: int, **_: Any) -> Tensor:
        if dist.get_rank() == 1:
            raise torch.OutOfMemoryError("nothing left")
        return torch.empty(size, dtype=torch.uint8)

    gpu = object.__new__(_Gpu)
    gpu.group, gpu.device, gpu.memory = group, torch.device("cpu"), []
    with mock.patch.object(symmetric, "empty", empty), mock.patch.object(torch.cuda, "empty_cache"):
        try:
            gpu.shared(2**20)
        except RuntimeError as error:
            return str(error)
    return ""


def test_no_rank_waits_for_one_that_has_no_room() -> None:
    for said in run_ranks(2, no_room_on_one_rank):
        assert said.startswith("1 MiB for messages between GPUs")
        assert "rank 1: OutOfMemoryError: nothing left" in said
        assert "set LIGHTHOUSE_COPY_ENGINE=0" in said


def test_the_copying_stream_waits_for_what_it_reads_and_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would copy what is not there yet, or what torch has given to others since."""
    order: list[Any] = []
    gpu: Any = object.__new__(_Gpu)
    gpu.device, gpu.stream = torch.device("cpu"), SimpleNamespace(wait_stream=lambda other: order.append(("waits for", other)))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the current stream")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: order.append(("in", stream)) or nullcontext())
    x, target = mock.Mock(), SimpleNamespace(copy_=lambda source: order.append(("copies", source)))
    with gpu.copying():
        gpu.copy(target, x)
    assert order == [("waits for", "the current stream"), ("in", gpu.stream), ("copies", x)]
    x.record_stream.assert_called_once_with(gpu.stream)
