"""Copies between GPUs, with threads in their place: each rank is a thread, its copying stream another, in one memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from random import Random
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lighthouse.context_parallel import copies as copies_module
from megatron_lighthouse.context_parallel import exchange as exchange_module
from megatron_lighthouse.context_parallel.copies import Copies, Message, copies_over, problem_of_all
from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.context_parallel.gpu import Gpu as RealGpu
from megatron_lighthouse.context_parallel.parts import Part
from megatron_lighthouse.context_parallel.ring import Ring
from megatron_lighthouse.sequence.layout import Layout
from megatron_lighthouse.softmax.blocks import BLOCKS
from tests.context_parallel.stand_in_gpu import Gpu, Shared, World
from tests.ranks import run_ranks
from tests.tolerances import assert_close

BATCH, HEADS, GROUPS, DIM = 2, 4, 2, 8


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
    flags = [[memory.view(torch.int32).tolist() for memory in shared] for shared in world.memory if shared[0].nbytes < 64]
    at_rest = [0] * (size + 1) + [1] * min(2, size - 1) + [0] * max(0, size - 3)
    assert flags == [[at_rest] * size] * 2, "a pass does not leave flags as it found them"
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


def test_messages_out_of_turn_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that would wait for itself, or leave flags other than it found them, must not go on in silence."""
    gpu = Gpu(0, World(1), one_queue=True)
    monkeypatch.setattr(gpu, "shared", lambda size: Shared([torch.zeros(size, dtype=torch.uint8)] * 3))
    monkeypatch.setattr(gpu, "_flag", lambda address: torch.ones((), dtype=torch.int32))
    monkeypatch.setattr(gpu, "give", lambda address: None)
    copies, x = Copies(0, 3, gpu), torch.zeros(4)  # type: ignore[arg-type]

    def send(hop: int) -> Message:
        return copies.send("keys", [x], hop, [x.shape], x.nbytes)

    with pytest.raises(RuntimeError, match="hop 2 is sent after hop 0"):
        send(2)
    first, second = send(1), send(2)
    with pytest.raises(RuntimeError, match=r"hop 1 is sent after hop 2, while hops \[1, 2\] are open"):
        send(1)
    first.close()
    second.close()
    with pytest.raises(RuntimeError, match="hop 2 is sent after hop 2"):
        send(2)
    send(1)


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

    gpu = object.__new__(RealGpu)
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


def test_the_copying_stream_waits_for_what_it_reads_and_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would copy what is not there yet, what is given to others since, or be left over where a capture ends."""
    order: list[Any] = []
    gpu: Any = object.__new__(RealGpu)
    gpu.device, gpu.stream = torch.device("cpu"), mock.Mock(wait_stream=lambda other: order.append(("waits for", other)))
    current = mock.Mock(wait_event=lambda event: order.append(("current waits for", event)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)

    def within(stream: Any) -> nullcontext[None]:
        order.append(("in", stream))
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "stream", within)
    target = SimpleNamespace(copy_=lambda source: order.append(("copies", source)))
    with gpu.copying():
        gpu.copy(target, "x")
    gpu.wait(gpu.left())
    assert order[:3] == [("waits for", current), ("in", gpu.stream), ("copies", "x")]
    assert order[3:] == [("current waits for", current.record_event.return_value)]


def test_a_flag_is_cleared_by_who_waited_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers that grow would be repeated by a graph: here every value is the same each time."""
    driver = ModuleType("cuda.bindings.driver")
    calls = mock.Mock()
    calls.wait.return_value = calls.write.return_value = (SimpleNamespace(value=0),)
    vars(driver).update({"cuStreamWaitValue32": calls.wait, "cuStreamWriteValue32": calls.write})
    vars(driver)["CUstreamWaitValue_flags"] = SimpleNamespace(CU_STREAM_WAIT_VALUE_EQ="equal")
    vars(driver)["CUstreamWriteValue_flags"] = SimpleNamespace(CU_STREAM_WRITE_VALUE_DEFAULT="default")
    bindings = ModuleType("cuda.bindings")
    vars(bindings)["driver"] = driver
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    gpu: Any = object.__new__(RealGpu)
    gpu.device = torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    gpu.give(64)
    gpu.take(64)
    given, taken = mock.call.write(7, 64, 1, "default"), mock.call.wait(7, 64, 1, "equal")
    assert calls.mock_calls == [given, taken, mock.call.write(7, 64, 0, "default")]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_captured_ring_repeats_what_it_does_without_a_graph(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, in any order that dependencies leave; between calls without a graph, also where these make slots anew."""
    world = World(size)
    gpus = [Gpu(rank, world) for rank in range(size)]
    copies = [Copies(rank, size, gpu) for rank, gpu in enumerate(gpus)]  # type: ignore[arg-type]
    monkeypatch.setattr(exchange_module, "copies_over", lambda group, device: copies[group])
    cases = [_case(24, seed) for seed in range(12)]
    between = [_case(n, n) for n in (48, 72)]

    def of_rank(rank: int) -> None:
        exchange: Any = Exchange(rank, Layout(size, rank))  # type: ignore[arg-type]
        attend, random = Ring(Slow(rank), exchange), Random(rank)

        def step(leaves: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
            query, key, value = leaves
            out = attend((query,), (key, value))
            return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

        def given(case: list[Tensor]) -> tuple[list[Tensor], Tensor]:
            *leaves, grad = (exchange.own(x) for x in case)
            return [x.requires_grad_() for x in leaves], grad

        held = given(cases[0])
        step(*held)
        with gpus[rank].capturing() as graph:
            results = step(*held)
        for number, case in enumerate(cases):
            leaves, grad = given(case)
            with torch.no_grad():
                for old, new in zip((*held[0], held[1]), (*leaves, grad), strict=True):
                    old.copy_(new)
            graph.replay(random, early=number % 3 - 1)
            repeated = [x.clone() for x in results]
            assert all(map(torch.equal, repeated, step(leaves, grad)))
            if number in (3, 7):
                step(*given(between[number // 4]))

    with ThreadPoolExecutor(size) as pool:
        list(pool.map(of_rank, range(size)))


def test_ranks_do_not_agree_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it would be done then; the first call of a size comes before."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="must be called with inputs of this size before a CUDA graph"):
        copies_over(mock.Mock(), torch.device("cuda", 0))
    gpu = mock.Mock()
    with pytest.raises(RuntimeError, match="must be called with inputs of this size before a CUDA graph"):
        Copies(0, 2, gpu).send("keys", [torch.zeros(2)], 1, [torch.Size([2])], 8)
    assert not gpu.shared.called
