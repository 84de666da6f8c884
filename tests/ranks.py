"""Processes that stand ready as context-parallel ranks, over gloo: what the tests of several ranks run on.

They are made once for all tests: of this process as it is when the tests are collected, with all that they import. A function
that a test hands them must be at the top level of a module.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SIZES = (2, 4, 8)
SECONDS = 120


class RankError(Exception):
    """What one of the ranks raised."""


class Ranks:
    """Eight processes, of which the first 2, 4 or 8 work together."""

    def __init__(self, start: str) -> None:
        context: Any = multiprocessing.get_context(start)
        if start == "forkserver":
            context.set_forkserver_preload(["torch.distributed", "tests.steps"])  # with it the kernels
        store = Path(tempfile.mkdtemp()) / "store"
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(max(SIZES)):
            ours, theirs = context.Pipe()
            self.pipes.append(ours)
            inherited = self.pipes if start == "fork" else []
            process = context.Process(target=_serve, args=(theirs, rank, str(store), inherited), daemon=True)
            process.start()
            self.processes.append(process)

    def run(self, size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What `function(group, *args)` returns on each of `size` ranks.

        Raises:
            RankError: what the first rank that failed raised.
        """
        task = pickle.dumps((size, function, args))
        for pipe in self.pipes[:size]:
            pipe.send_bytes(task)
        answers = []
        for rank, pipe in enumerate(self.pipes[:size]):
            if not pipe.poll(SECONDS):
                RANKS.clear()
                for process in self.processes:
                    process.kill()
                raise RankError(f"rank {rank} of {size} did not answer within {SECONDS} s")
            answers.append(pickle.loads(pipe.recv_bytes()))
        for error, _ in answers:
            if error:
                raise RankError(error)
        return [result for _, result in answers]


RANKS: list[Ranks] = []
"""One, once it is made."""


def stand_ready() -> None:
    """Before this process has differentiated anything: a fork of one that has cannot."""
    import torch._dynamo
    import torch.fx.experimental.symbolic_shapes  # noqa: F401  the first gradient of each rank would

    RANKS[:] = [Ranks("fork")]


def run_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """See `Ranks.run`."""
    if not RANKS:
        RANKS.append(Ranks("forkserver"))
    return RANKS[0].run(size, function, *args)


def _serve(pipe: Connection, rank: int, store: str, inherited: Sequence[Connection]) -> None:
    for end in inherited:  # else no rank would see that the tests have ended
        end.close()
    import torch
    import torch.distributed as dist

    from tests.interpreter import quicken

    quicken()
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    minutes = timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=max(SIZES), timeout=minutes)
    groups = {size: dist.new_group(list(range(size))) for size in SIZES}
    while True:
        size, function, args = pickle.loads(pipe.recv_bytes())
        try:
            answer = (None, function(groups[size], *args))
        except Exception:
            answer = (traceback.format_exc(), None)
        pipe.send_bytes(pickle.dumps(answer))
