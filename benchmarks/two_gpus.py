"""`python benchmarks/two_gpus.py --out FOLDER`: training steps of the 530M model's layers on two GPUs, and on one of them.

32,768 tokens (k = 512) and 98,304 (k = 1536) by context parallelism over both and on one, dense and 26 of 30 layers Lighthouse,
under Megatron's CUDA graphs too; packed documents and graphs by tensor parallelism. Each is a run of `training_step.py`, two of
one GPU at a time; a run starts while the one before it ends, for a process imports for longer. Leaves two_gpus.csv, .json and
.png, as far as it came, after every run: seconds, memory, efficiency (one GPU's time over twice that of two, graphs or not,
whichever is faster on one), and what the plan predicts. `--within` ends all of it, with status 75 where runs are left. The same
command goes on: what went well is not run again. `--list` names the runs, `--runs` takes some of them.

`--tiny` tries it on a CPU.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from csv_tables import write_csv
from processes import Process, end, started
from scaling_points import Point
from training_step import RUNS, command, on_cpu, said, step_times
from two_gpus_plots import draw

from megatron_lighthouse.context_parallel.schemes import SWITCH
from megatron_lighthouse.launch.torchrun import one_rank
from megatron_lighthouse.lighthouse.config import LighthouseConfig
from megatron_lighthouse.plan.calibration import coefficients
from megatron_lighthouse.plan.device import DEVICES
from megatron_lighthouse.plan.time import tokens_per_gpu
from megatron_lighthouse.versions import environment

ARGUMENTS = {"dense": RUNS["dense"], "lighthouse": RUNS["lighthouse, first and last two layers dense"]}
GRAPHS = "--cuda-graph-impl"
DOCUMENTS = ("--dataloader-inter-document-masking",)
TENSOR = ("--context-parallel-size", "1", "--tensor-model-parallel-size", "2", "--sequence-parallel")
EARLY = 8.0
"""Seconds before its last step at which the next run starts."""
LIMIT, LEAST = 90, 25
"""Seconds of a run at most, and those in which none can be timed: none begins with less."""
GOES_ON = 75
"""The status where runs are left: EX_TEMPFAIL."""
CUT_OFF = "cut off"
GOING: list[Process] = []
LOCK = Lock()


@dataclass(frozen=True)
class Run:
    """A training run."""

    attention: str
    tokens: int
    gpus: int
    how: str = ""
    more: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    steps: int = 10

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.attention, str(self.tokens), f"{self.gpus}gpu", self.how)))

    @property
    def plain(self) -> bool:
        """Whether the plan knows it: of one document."""
        return DOCUMENTS[0] not in self.more

    def command(self, out: Path, tiny: bool) -> list[str]:
        """What trains it, its data in `out`."""
        budget = 0 if DOCUMENTS[0] in self.more else self.tokens // 64  # each document has one by its length
        sizes = {"out": out, "seq_length": self.tokens, "layers": 30, "ranks": self.gpus, "budget": budget, "steps": self.steps}
        if tiny:
            sizes |= {"seq_length": self.tokens // 128, "layers": 6, "budget": budget and 8}
        words = command(ARGUMENTS[self.attention], argparse.Namespace(**sizes), [*self.more])
        return on_cpu(words) if tiny else words

    @property
    def predicted(self) -> float:
        """Seconds a step on H200s, by the plan."""
        context, tensor = (1, self.gpus) if set(TENSOR) <= {*self.more} else (self.gpus, 1)
        config = LighthouseConfig(3, 4, self.tokens // 64)
        point = Point(self.attention, self.tokens, context, config=config, recompute="none", tensor_parallel=tensor)
        graphed = {"cuda_graph_impl": self.more[1]} if GRAPHS in self.more else {}
        run = point.run.change(device=DEVICES["h200"], options=graphed)
        return self.tokens / tokens_per_gpu(run, coefficients()) / self.gpus


def graphs(
    attention: str, tokens: int, gpus: int, how: str = "graphs", *more: str, kind: str = "local", **environment: str
) -> Run:
    unseen = ("--no-check-for-nan-in-loss-and-grad",) if kind == "full_iteration" else ()
    return Run(attention, tokens, gpus, how, (GRAPHS, kind, *unseen, *more), environment)


ALONE = [
    [
        graphs("lighthouse", 32768, 1),
        Run("lighthouse", 98304, 1),
        Run("lighthouse", 98304, 1, "documents", DOCUMENTS),
    ],
    [
        Run("dense", 32768, 1),
        graphs("lighthouse", 32768, 1, "whole graphs", kind="full_iteration"),
        Run("dense", 98304, 1, steps=6),
    ],
]
"""On the first GPU, and on the second."""
TOGETHER = [
    graphs("lighthouse", 32768, 2),
    Run("lighthouse", 98304, 2),
    Run("lighthouse", 32768, 2),
    Run("dense", 32768, 2),
    Run("dense", 98304, 2, steps=8),
    Run("lighthouse", 98304, 2, "TP documents", (*TENSOR, *DOCUMENTS)),
    graphs("lighthouse", 32768, 2, "TP graphs", *TENSOR),
    graphs("lighthouse", 98304, 2),
    Run("lighthouse", 98304, 2, "TP", TENSOR),
    graphs("lighthouse", 32768, 2, "whole graphs", kind="full_iteration"),
    graphs("lighthouse", 32768, 2, "graphs, by NCCL", **{SWITCH: "0"}),
]
"""On both, the most wanted first."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "two_gpus")
    parser.add_argument("--runs", nargs="+", default=["*"], metavar="NAME", help="which of them; * stands for any letters")
    parser.add_argument("--within", type=float, default=400, metavar="SECONDS")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    options.end = time.monotonic() + options.within
    lanes = [[run for run in lane if any(fnmatch(run.name, x) for x in options.runs)] for lane in (*ALONE, TOGETHER)]
    if options.list or not any(lanes):
        raise SystemExit("\n".join(run.name for lane in lanes for run in lane) or f"--runs {options.runs}: see --list")
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, partial(stop, options))
    before = options.out / "two_gpus.json"
    rows = [row for row in json.loads(before.read_text())["runs"] if row["status"] == 0] if before.is_file() else []
    names = [run.name for lane in lanes for run in lane]
    lanes = [[run for run in lane if run.name not in {row["run"] for row in rows}] for lane in lanes]
    if options.tiny:
        in_turn([run for lane in lanes for run in lane], None, options, rows)
    else:
        with ThreadPoolExecutor(2) as pool:
            for one in [pool.submit(in_turn, lane, str(gpu), options, rows) for gpu, lane in enumerate(lanes[:2])]:
                one.result()
        in_turn(lanes[2], None, options, rows)
    found = {row["run"]: row["status"] for row in rows}
    failed = [name for name, status in found.items() if status not in (0, CUT_OFF)]
    left = [name for name in names if found.get(name, CUT_OFF) == CUT_OFF]
    print(f"failed: {', '.join(failed) or 'none'}; left: {', '.join(left) or 'none'}", flush=True)
    sys.exit(1 if failed else GOES_ON if left else 0)


def stop(options: argparse.Namespace, *_: object) -> None:
    """End what runs, so that no rank disturbs what comes after."""
    options.end = 0
    end([process for process in GOING if process.poll() is None])
    sys.exit(143)


def in_turn(runs: Sequence[Run], gpu: str | None, options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Train them one after another on a GPU, or on all, and add what they say to the table."""
    before = None
    for run in runs:
        if options.end - time.monotonic() < LEAST:
            break
        going = Going(run, gpu, options)
        if before:
            before.end(rows)
        going.nearly()
        before = going
    if before:
        before.end(rows)


class Going:
    """A run that goes on."""

    def __init__(self, run: Run, gpu: str | None, options: argparse.Namespace) -> None:
        self.run, self.out = run, options.out
        self.log = options.out / f"{run.name.replace(' ', '-')}.log"
        self.until = min(options.end, time.monotonic() + LIMIT)
        words = run.command(options.out / f"gpu-{gpu}", options.tiny)
        seen = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        self.log.unlink(missing_ok=True)
        self.began = time.monotonic()
        self.process = started(words, self.log, {**one_rank(), **seen, **run.environment})
        GOING.append(self.process)

    def nearly(self) -> None:
        """Wait until its last steps, or its end."""
        while self.process.poll() is None and time.monotonic() < self.until:
            times = step_times(self.log.read_text(errors="replace"))
            if len(times) > 3 and (self.run.steps - len(times)) * times[-1] < EARLY:
                return
            time.sleep(0.3)

    def end(self, rows: list[dict[str, Any]]) -> None:
        """Wait for its end, and add a row."""
        try:
            status: int | str = self.process.wait(max(1, self.until - time.monotonic()))
        except subprocess.TimeoutExpired:
            status = f"over {LIMIT} s" if time.monotonic() - self.began >= LIMIT else CUT_OFF
            end([self.process])
        text = self.log.read_text(errors="replace")
        if status:
            print(f"{self.run.name}: status {status}\n{text[-2500:]}", flush=True)
        run = self.run
        row = {"run": run.name, "attention": run.attention, "tokens": run.tokens, "GPUs": run.gpus, "how": run.how or "eager"}
        row |= {"status": status, **said(text, run.tokens), "predicted": round(run.predicted, 3) if run.plain else None}
        with LOCK:
            rows.append(row)
            print(row, flush=True)
            keep(rows, self.out)


def keep(rows: list[dict[str, Any]], out: Path) -> None:
    """The table so far, and how efficient two GPUs are."""
    for row in rows:
        same = [
            one["seconds a step"]
            for one in rows
            if one["GPUs"] == 1
            and (one["attention"], one["tokens"]) == (row["attention"], row["tokens"])
            and ("documents" in one["how"]) == ("documents" in row["how"])
            and one["seconds a step"]
        ]
        known = row["GPUs"] == 2 and row["seconds a step"] and same
        row["of one GPU's time"] = round(row["seconds a step"] / min(same), 4) if known else None
        row["efficiency"] = round(min(same) / row["seconds a step"] / 2, 4) if known else None
    write_csv(out / "two_gpus.csv", rows)
    draw(out / "two_gpus.png", rows)
    (out / "two_gpus.json").write_text(json.dumps({**environment(), "runs": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
