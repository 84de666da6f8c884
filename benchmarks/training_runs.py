"""Training runs of a table, one after another on the same GPUs.

A run starts while the one before it ends, for a process imports for longer. What benchmarks/two_gpus.py and
benchmarks/layouts.py share: their options, and `train`. Table, picture and JSON are there after every run, as far as it came.
`--within` ends all of it, with status 75 where runs are left. The same command goes on: what went well is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, NoReturn, Protocol

from csv_tables import write_csv
from processes import Process, end, started
from training_runs_plots import Panel, draw
from training_step import step_times

from megatron_lighthouse.launch.torchrun import one_rank
from megatron_lighthouse.versions import environment

EARLY = 8.0
"""Seconds before its last step at which the next run starts."""
LIMIT, LEAST = 120.0, 25.0
"""Seconds that a run has at most, beside twice the predicted ones, and those in which no step can be timed."""
SLOWER = 10.0
"""Times its limit, that a run has on a CPU."""
GOES_ON = 75
"""The status where runs are left: EX_TEMPFAIL."""
CUT_OFF = "cut off"
GOING: list[Process] = []
LOCK = Lock()
Row = dict[str, Any]


class Run(Protocol):
    """A training run, and the row of a table that it makes."""

    @property
    def name(self) -> str: ...
    @property
    def steps(self) -> int: ...
    @property
    def predicted(self) -> float:
        """Seconds a step, by the plan."""

    @property
    def environment(self) -> Mapping[str, str]:
        """What it adds to that of this process."""

    @property
    def title(self) -> Row:
        """What it is: the row's first columns."""

    def command(self, out: Path, tiny: bool) -> list[str]:
        """What trains it, its data in `out`."""

    def found(self, log: str) -> Row:
        """What its log says, beside what was predicted."""


@dataclass(frozen=True)
class Table:
    """What runs leave: `name`.csv, .json and .png."""

    name: str
    beside: Callable[[Sequence[Row]], None]
    """Adds to rows what they say beside each other."""
    panels: Sequence[Panel]
    """Of the picture."""
    lists: Collection[str] = ()
    """Columns of the JSON alone."""

    def keep(self, rows: Sequence[Row], out: Path) -> None:
        """Write the table so far."""
        self.beside(rows)
        write_csv(out / f"{self.name}.csv", rows, self.lists)
        draw(out / f"{self.name}.png", rows, self.panels)
        (out / f"{self.name}.json").write_text(json.dumps({**environment(), "runs": rows}, indent=2) + "\n")

    def before(self, out: Path, again: Collection[str]) -> list[Row]:
        """The rows that are there; of the runs that are to go on, `again`, those that went well."""
        path = out / f"{self.name}.json"
        rows = json.loads(path.read_text())["runs"] if path.is_file() else []
        return [row for row in rows if row["status"] == 0 or row["run"] not in again]


def parser(description: str | None, table: Table) -> argparse.ArgumentParser:
    """Of a script of such runs."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / table.name)
    made.add_argument("--runs", nargs="+", default=["*"], metavar="NAME", help="which of them; * stands for any letters")
    made.add_argument("--within", type=float, default=400, metavar="SECONDS")
    made.add_argument("--list", action="store_true")
    made.add_argument("--tiny", action="store_true")
    return made


def chosen[AnyRun: Run](runs: Sequence[AnyRun], options: argparse.Namespace) -> list[AnyRun]:
    """Those that --runs names."""
    return [run for run in runs if any(fnmatch(run.name, name) for name in options.runs)]


def train(options: argparse.Namespace, table: Table, alone: Sequence[Sequence[Run]], together: Sequence[Run]) -> NoReturn:
    """Train those that --runs names, `alone` on one GPU each side by side, then `together` on all; ends this process."""
    options.end = time.monotonic() + options.within
    lanes = [chosen(lane, options) for lane in (*alone, together)]
    names = [run.name for lane in lanes for run in lane]
    if options.list or not names:
        raise SystemExit("\n".join(names) or f"--runs {options.runs}: see --list")
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, partial(stop, options))
    rows = table.before(options.out, names)
    lanes = [[run for run in lane if run.name not in {row["run"] for row in rows}] for lane in lanes]
    if options.tiny:
        in_turn([run for lane in lanes for run in lane], None, options, table, rows)
    else:
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(len(alone))))
        with ThreadPoolExecutor(max(1, len(alone))) as pool:
            side = [
                pool.submit(in_turn, lane, gpu, options, table, rows)
                for gpu, lane in zip(gpus.split(","), lanes[:-1], strict=False)
            ]
            for one in side:
                one.result()
        in_turn(lanes[-1], None, options, table, rows)
    found = {row["run"]: row["status"] for row in rows if row["run"] in names}
    failed = [name for name, status in found.items() if status not in (0, CUT_OFF)]
    left = [name for name in names if found.get(name, CUT_OFF) == CUT_OFF]
    print(f"failed: {', '.join(failed) or 'none'}; left: {', '.join(left) or 'none'}", flush=True)
    sys.exit(1 if failed else GOES_ON if left else 0)


def stop(options: argparse.Namespace, *_: object) -> None:
    """End what runs, so that no rank disturbs what comes after."""
    options.end = 0
    end([process for process in GOING if process.poll() is None])
    sys.exit(143)


def in_turn(runs: Sequence[Run], gpu: str | None, options: argparse.Namespace, table: Table, rows: list[Row]) -> None:
    """Train them one after another on a GPU, or on all, and add what they say to the table."""
    before = None
    for run in runs:
        if options.end - time.monotonic() < LEAST + run.predicted:
            continue  # a shorter one may have the time
        going = Going(run, gpu, options)
        if before:
            before.end(table, rows)
        going.nearly()
        before = going
    if before:
        before.end(table, rows)


class Going:
    """A run that goes on."""

    def __init__(self, run: Run, gpu: str | None, options: argparse.Namespace) -> None:
        self.run, self.out = run, options.out
        self.log = options.out / f"{run.name.replace(' ', '-')}.log"
        self.limit = (LIMIT + 2 * run.steps * run.predicted) * (SLOWER if options.tiny else 1)
        words = run.command(options.out / f"gpu-{gpu}", options.tiny)
        seen = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        self.log.unlink(missing_ok=True)
        self.began = time.monotonic()
        self.until = min(options.end, self.began + self.limit)
        self.process = started(words, self.log, {**one_rank(), **seen, **run.environment})
        GOING.append(self.process)

    def nearly(self) -> None:
        """Wait until its last steps, or its end."""
        while self.process.poll() is None and time.monotonic() < self.until:
            times = step_times(self.log.read_text(errors="replace"))
            if len(times) > min(3, self.run.steps - 1) and (self.run.steps - len(times)) * times[-1] < EARLY:
                return
            time.sleep(0.3)

    def end(self, table: Table, rows: list[Row]) -> None:
        """Wait for its end, and add a row."""
        try:
            status: int | str = self.process.wait(max(1, self.until - time.monotonic()))
        except subprocess.TimeoutExpired:
            status = f"over {self.limit:.0f} s" if time.monotonic() - self.began >= self.limit else CUT_OFF
            end([self.process])
        text = self.log.read_text(errors="replace")
        if status:
            print(f"{self.run.name}: status {status}\n{text[-2500:]}", flush=True)
        row = {"run": self.run.name, **self.run.title, "status": status, **self.run.found(text)}
        with LOCK:
            rows.append(row)
            print({name: value for name, value in row.items() if name not in table.lists}, flush=True)
            table.keep(rows, self.out)
