"""`python benchmarks/graphs_training.py --out FOLDER`: does a whole run train under CUDA graphs as it does without?

A GPT of 12 layers, 8,192 tokens, two micro-batches, 30 iterations with Transformer Engine: eager, and with each of Megatron's
graphs, once with the optimizer's step in a graph too. All evaluate every three iterations, so just before a whole iteration is
captured too, switch to dense after 20, and save after 15, where further runs go on: under the same graphs, from eager under
graphs, and from graphs eager. Losses and losses of evaluations are held to those of the eager run that nothing stopped, to the
bit, for --deterministic-mode is on. With `--rounded` it is off, and distances are printed alone, as always for the optimizer's
graph, which computes its step otherwise.

All share the GPU, so that their times say how long a capture took and little else; `--kinds` takes some. `--ranks 2` has each
run's sequences over two GPUs, where whole iterations are left out. `--warmup 6` begins all of them with a dense warm-up. Ends
within `--within` seconds. Leaves graphs_training.csv, graphs_training.json and the logs, and ends with status 1 where a run
failed or differs. `--tiny` tries it on a CPU, all eager.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csv_tables import write_csv
from h100_training import DETERMINISTIC
from million import TINY
from processes import Process, end, started
from training_agreement import MODEL, TE
from training_step import said

from megatron_lighthouse.launch.torchrun import one_rank, torchrun
from megatron_lighthouse.plots import Scalars, read_scalars
from megatron_lighthouse.recipe.presets import default_text
from megatron_lighthouse.versions import environment

FULL = "--cuda-graph-impl full_iteration --no-check-for-nan-in-loss-and-grad"
KINDS = {
    "eager": "",
    "local": "--cuda-graph-impl local",
    "full_iteration": FULL,
    # beside a sharded optimizer Megatron saves none whose step is in a graph: see mcore/command_line/optimizer_graph
    "optimizer too": f"{FULL} --optimizer-cuda-graph --no-save-optim",
}
OTHERWISE = ("optimizer too",)
"""Whose steps are rounded otherwise than eager ones."""
CROSSED = (("eager", "local"), ("full_iteration", "eager"), ("optimizer too", "eager"))
"""Runs that go on from the checkpoint of another kind's."""
STEPS, SAVED, SWITCHED = 30, 15, 20
RUN = f"""
    --num-layers 12 --seq-length 8192 --max-position-embeddings 8192 --lighthouse-budget 128 --train-iters {STEPS}
    --eval-interval 3 --eval-iters 2 --save-interval {SAVED} --lighthouse-stage2-at {SWITCHED}
    --tensorboard-log-interval 1 --log-memory-to-tensorboard --num-workers 1
"""
ON_GPU = [*TE, *"--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather".split()]
"""As recipes have it. Megatron's sharded optimizer does not go on without Transformer Engine."""
TOY = f"{TINY} --num-layers 4 --seq-length 256 --max-position-embeddings 256 --lighthouse-budget 8 --lighthouse-dense-last 1"
LOSSES = ("lm loss", "lm loss validation")


@dataclass(frozen=True)
class Run:
    """A training run; one that goes on has the kind of the run whose checkpoint it takes up."""

    kind: str
    begun: str = ""

    @property
    def name(self) -> str:
        return self.kind + (f", from {self.begun}" if self.begun else "")

    def folder(self, options: argparse.Namespace) -> Path:
        found: Path = options.out / self.name.replace(", ", "-").replace(" ", "-")
        return found

    def may_start(self, options: argparse.Namespace) -> bool:
        """Whether its checkpoint is there: the rest of that run need not be waited for, as this one imports for longer."""
        tracker = Run(self.begun).folder(options) / "checkpoints" / "latest_checkpointed_iteration.txt"
        return not self.begun or (tracker.is_file() and int(tracker.read_text()) >= SAVED)

    def command(self, options: argparse.Namespace) -> list[str]:
        """Where a flag stands twice, the last counts."""
        folder, first = self.folder(options), Run(self.begun).folder(options)
        start = [sys.executable] if options.ranks == 1 else torchrun(options.ranks)
        how = TOY if options.tiny else " ".join([*ON_GPU, KINDS[self.kind], "" if options.rounded else "--deterministic-mode"])
        warmup = ("--lighthouse-dense-warmup-iters", str(options.warmup)) if options.warmup else ()
        load = ("--load", str(first / "checkpoints"), "--ckpt-step", str(SAVED)) if self.begun else ()
        return [
            *start,
            *("-m", "megatron_lighthouse.pretrain_gpt", *MODEL, *RUN.split(), *warmup, *how.split()),
            *("--context-parallel-size", str(options.ranks), "--save", str(folder / "checkpoints"), *load),
            *("--tensorboard-dir", str(folder / "tensorboard"), "--data-cache-path", str(folder / "data")),
            *("--text-data", *default_text()),
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="besides eager")
    parser.add_argument("--ranks", type=int, default=1, help="GPUs, by context parallelism")
    parser.add_argument("--warmup", type=int, default=0, metavar="N", help="dense iterations at the start")
    parser.add_argument("--rounded", action="store_true", help="without --deterministic-mode")
    parser.add_argument("--within", type=float, default=90, metavar="SECONDS")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    kinds = [kind for kind in KINDS if kind in (*options.kinds, "eager") and (options.ranks == 1 or FULL not in KINDS[kind])]
    crossed = [Run(kind, begun) for kind, begun in CROSSED if {kind, begun} <= {*kinds}]
    further = [Run(kind, kind) for kind in kinds if "--no-save-optim" not in KINDS[kind]]
    runs = [*map(Run, kinds), *further, *crossed]
    status = trained(runs, options)
    rows = table(runs, status, options)
    for run in runs:
        shutil.rmtree(run.folder(options) / "checkpoints", ignore_errors=True)  # gigabytes each
    write_csv(options.out / "graphs_training.csv", rows)
    (options.out / "graphs_training.json").write_text(json.dumps({**environment(), "runs": rows}, indent=2) + "\n")
    for row in rows:
        print(json.dumps(row), flush=True)
    wrong = [row["run"] for row in rows if row["status"] or (row["bits"] is False and not row["run"].startswith(OTHERWISE))]
    if any(status.values()) or (wrong and not options.rounded):
        raise SystemExit(f"failed or not as eager: {', '.join(wrong)}")


def trained(runs: Sequence[Run], options: argparse.Namespace) -> dict[Run, int | str]:
    """Train all side by side, each from where its checkpoint is there; answers how they ended."""
    until = time.monotonic() + options.within
    going: dict[Run, Process] = {}
    found: dict[Run, int | str] = {}
    while time.monotonic() < until:
        for run in runs:
            if run not in going and run.may_start(options):
                going[run] = begun(run, options)
            if run in going and run not in found and (status := going[run].poll()) is not None:
                found[run] = status
                print(f"{run.name}: status {status}, {until - time.monotonic():.0f} s are left", flush=True)
        if len(found) == len(going):  # the others' checkpoints will never come
            break
        time.sleep(0.2)
    late = [run for run in going if run not in found]
    end([going[run] for run in late])
    found |= dict.fromkeys(late, "cut off")
    return {run: found.get(run, "never began") for run in runs}


def begun(run: Run, options: argparse.Namespace) -> Process:
    folder = run.folder(options)
    shutil.rmtree(folder, ignore_errors=True)  # of a call before this one
    folder.mkdir(parents=True)
    given = {**({} if options.rounded else DETERMINISTIC), "OMP_NUM_THREADS": "2"}
    return started(run.command(options), folder / "log.txt", {**one_rank(), **given})


def table(runs: Sequence[Run], status: dict[Run, int | str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """What each run says, and how far its losses lie from the first one's, which is eager."""
    rows: list[dict[str, Any]] = []
    eager: Scalars = {}
    for run in runs:
        log = run.folder(options) / "log.txt"
        text = log.read_text(errors="replace") if log.is_file() else ""
        scalars: Scalars = read_scalars(run.folder(options) / "tensorboard") if status[run] == 0 else {}
        eager = scalars if run == runs[0] else eager
        told = said(text, 1)
        row = {"run": run.name, "status": status[run], **{name: told.get(name) for name in ("seconds a step", "captured in s")}}
        for what, name in (("peak GiB", "mem-max-allocated-bytes"), ("held GiB", "mem-reserved-bytes")):
            row[what] = round(float(scalars[name][1].max()) / 2**30, 3) if name in scalars else None
        far = {name: distance(eager[name], scalars[name]) for name in LOSSES if name in scalars and eager}
        row |= {f"distance of {name}": value for name, value in far.items()}
        row["bits"] = not any(far.values()) if far else None
        row |= {name: [round(float(x), 5) for x in scalars[name][1]] for name in LOSSES if name in scalars}
        rows.append(row)
        if status[run]:
            print(f"{run.name}: status {status[run]}\n{text[-3000:]}", flush=True)
    return rows


def distance(one: tuple[Any, Any], other: tuple[Any, Any]) -> float:
    """The greatest at the steps of `other`, all of which `one` has; infinite where it has them not."""
    values = dict(zip(one[0].tolist(), one[1].tolist(), strict=True))
    found = zip(other[0].tolist(), other[1].tolist(), strict=True)
    return max((abs(values.get(step, math.inf) - value) for step, value in found), default=math.inf)


if __name__ == "__main__":
    main()
