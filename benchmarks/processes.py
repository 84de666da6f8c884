"""Processes of the benchmarks: each with a log and a session of its own, and ended with all that it started."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

Process = subprocess.Popen[bytes]
GONE = 2.0
"""Seconds in which a process that was killed is gone, unless a driver holds it."""
PR_SET_CHILD_SUBREAPER = 36


def started(words: Sequence[str], log: Path, environment: Mapping[str, str], cwd: Path | None = None) -> Process:
    """A process whose output and errors go to `log`, behind what it has."""
    with log.open("ab") as file:
        return subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=cwd,
            start_new_session=True,
        )


def end(processes: Sequence[Process], grace: float = 10) -> None:
    """Tell those that run to end, and after `grace` seconds kill what is left of them and of all that they started.

    A group is not enough: ranks of torchrun, and runs that a benchmark starts, are in sessions of their own.
    """
    running = [process for process in processes if process.poll() is None]
    family = [one for process in running for one in _family(process.pid)]
    for process in running:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
    until = time.monotonic() + grace
    while time.monotonic() < until and any(process.poll() is None for process in running):
        time.sleep(0.05)
    _kill(family)
    for process in running:
        with suppress(subprocess.TimeoutExpired):
            process.wait(GONE)
    begun = {process.pid for process in running}
    psutil.wait_procs([one for one in family if one.pid not in begun], GONE)  # the kernel takes a while to end them


def adopt() -> None:
    """Have what a child leaves behind become a child of this process, where `end_orphans` finds it."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_orphans(known: Iterable[Process]) -> None:
    """Kill the children of this process but those that it started and knows, with all that they started."""
    ours = {process.pid for process in known}
    orphans = [one for one in psutil.Process().children() if one.pid not in ours]
    _kill(one for orphan in orphans for one in _family(orphan.pid))
    psutil.wait_procs(orphans, GONE)


def _family(pid: int) -> list[psutil.Process]:
    with suppress(psutil.Error):
        one = psutil.Process(pid)
        return [one, *one.children(recursive=True)]
    return []


def _kill(processes: Iterable[psutil.Process]) -> None:
    for one in processes:
        with suppress(psutil.Error):  # gone, or another's by now
            one.kill()
