"""A GPU's streams by threads, and its graphs by lists: each rank is a thread, its copying stream another, in one memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import Queue
from random import Random
from threading import Barrier, Event, Thread
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


class Graph(TorchDispatchMode):
    """What was captured, as a CUDA graph: work, and after which other work; nothing else is kept of its order."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[tuple[Callable[[], Any], bool, set[int]]] = []
        self.last: dict[bool, set[int]] = {False: set(), True: set()}
        """After what the next work of the current stream comes, and of the copying one."""

    def add(self, work: Callable[[], Any], copying: bool) -> int:
        self.nodes.append((work, copying, self.last[copying]))
        self.last[copying] = {len(self.nodes) - 1}
        return len(self.nodes) - 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What torch computes is computed again into the same memory."""
        found = func(*args, **(kwargs or {}))

        def again() -> None:
            for old, new in zip(tree_leaves(found), tree_leaves(func(*args, **(kwargs or {}))), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

        self.add(again, copying=False)
        return found

    def replay(self, random: Random, early: int) -> None:
        """All work, in one queue: in any order in which each comes after what it was captured after.

        Args:
            early: 1 where copies come as early as that allows, -1 where they come as late, 0 for anywhere between.
        """
        missing = [set(before) for *_, before in self.nodes]
        ready = [i for i, before in enumerate(missing) if not before]
        with torch.no_grad():
            for _ in self.nodes:
                done = max(ready, key=lambda i: (early * self.nodes[i][1], random.random()))
                ready.remove(done)
                self.nodes[done][0]()
                for i, before in enumerate(missing):
                    if done in before:
                        before.remove(done)
                        if not before:
                            ready.append(i)
        assert not ready


class Gpu:
    """Work given to the copying stream is done by a thread, in order and late; all other at once.

    With `one_queue` that too, as where all streams share one: what waits for later work then waits for ever.
    """

    def __init__(self, rank: int, world: World, one_queue: bool = False) -> None:
        self.rank, self.world, self.one_queue, self.inside = rank, world, one_queue, False
        self.graph: Graph | None = None
        self.queue: Queue[Callable[[], None]] = Queue()
        Thread(target=self._copy_for_ever, daemon=True).start()

    @contextmanager
    def capturing(self) -> Iterator[Graph]:
        """What is done inside is kept, and the work of streams not done."""
        self.graph = graph = Graph()
        with graph:
            yield graph
        self.graph = None
        left = set(range(len(graph.nodes))) - set().union(*(before for *_, before in graph.nodes))
        assert left <= graph.last[False], "a stream was not joined: CUDA refuses such a graph"

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
        if self.graph:
            self.graph.last[True] = self.graph.last[True] | self.graph.last[False]
        yield
        self.inside = False

    def copy(self, target: Tensor, x: Tensor) -> None:
        self._give(lambda: target.copy_(x))

    def left(self) -> Any:
        if self.graph:
            return self.graph.last[self.inside]
        event = Event()
        self._give(event.set)
        return event

    def wait(self, left: Any) -> None:
        if self.graph:
            self.graph.last[self.inside] = self.graph.last[self.inside] | left
        else:
            assert left.wait(SECONDS), f"rank {self.rank} waits for its own copies for ever"

    def take(self, address: int) -> None:
        flag = self._flag(address)

        def take() -> None:
            end = time.monotonic() + SECONDS
            while int(flag) != 1:
                assert time.monotonic() < end, f"rank {self.rank} waits for a flag for ever"
                time.sleep(1e-5)
            flag.zero_()

        self._give(take)

    def give(self, address: int) -> None:
        flag = self._flag(address)

        def give() -> None:
            assert int(flag) == 0, f"rank {self.rank} gives a flag that nobody has taken yet"
            flag.fill_(1)

        self._give(give)

    def _flag(self, address: int) -> Tensor:
        for shared in self.world.memory:
            for memory in shared:
                if 0 <= (offset := address - memory.data_ptr()) < memory.nbytes:
                    return memory.view(torch.int32)[offset // 4]
        raise AssertionError("an address that nobody has")

    def _give(self, work: Callable[[], Any]) -> None:
        if self.graph:
            self.graph.add(work, self.inside)
        elif self.inside and not self.one_queue:
            self.queue.put(work)
        else:
            work()

    def _copy_for_ever(self) -> None:
        with torch.no_grad():
            while True:
                self.queue.get()()
