"""`python benchmarks/training_step.py --out FOLDER`: a training step of the paper's 530M model at 98,304 tokens, one GPU.

Megatron with Transformer Engine, bf16, no recompute: dense attention, 26 of 30 layers Lighthouse, these and the other four with
twice the budget, and all 30 alike, each in a process of its own through `megatron_lighthouse.pretrain_gpt`. Reads step time and
peak memory from Megatron's log. Leaves training_step.csv, summary.json and the logs. `--budget`, `--seq-length` and `--layers`
change the model; `--ranks 2` shares the sequence between two GPUs by context parallelism. `--against CHECKOUT` times another
build's step after each. No run takes longer than `--limit` seconds; one that fails leaves the end of its log, the others go on,
and the status is 1. What else is given goes to every run, such as `--cuda-graph-impl local`.

`--tiny` tries it on a CPU, without graphs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from csv_tables import write_csv
from million import TINY
from processes import end, started

from megatron_lighthouse.launch.torchrun import ROOT, one_rank, torchrun
from megatron_lighthouse.recipe.presets import default_text
from megatron_lighthouse.versions import environment

MODEL = """
    --bf16 --transformer-impl transformer_engine --attention-backend fused --distributed-backend nccl
    --hidden-size 1024 --ffn-hidden-size 1536 --num-attention-heads 8 --kv-channels 128
    --position-embedding-type rope --normalization RMSNorm --disable-bias-linear --swiglu
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --no-gradient-accumulation-fusion
    --micro-batch-size 1 --global-batch-size 1 --lr 1e-4 --lr-decay-style constant --clip-grad 1.0
    --log-interval 1 --log-throughput --eval-iters 0 --eval-interval 100000 --seed 7
    --no-create-attention-mask-in-dataloader
""".split()
ON_GPU = ("--bf16", "--cuda-graph-impl", "--optimizer-cuda-graph")
"""What a CPU does not take."""
EDGES = "lighthouse, edge layers with twice the budget"
RUNS = {
    "dense": ["--attention", "dense"],
    "lighthouse, first and last two layers dense": ["--attention", "lighthouse"],
    EDGES: ["--attention", "lighthouse"],
    "lighthouse, all layers": ["--attention", "lighthouse", "--lighthouse-dense-first", "0", "--lighthouse-dense-last", "0"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "training_step")
    parser.add_argument("--seq-length", type=int, default=98304)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--budget", type=int, default=1536)
    parser.add_argument("--steps", type=int, default=10, help="iterations a run; the first three are not counted")
    parser.add_argument("--ranks", type=int, default=1, help="GPUs, by context parallelism")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="time another build too")
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS), help="which of them")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="of a run")
    parser.add_argument("--tiny", action="store_true")
    options, more = parser.parse_known_args()
    if options.tiny:
        options.seq_length, options.layers, options.budget = 768, 6, 8
    options.out = options.out.resolve()  # a run starts in its build's folder
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    builds = {"": ROOT, **({"against": options.against.resolve()} if options.against else {})}
    for name, (build, code) in product(options.runs, builds.items()):
        found = measure(name, RUNS[name], options, more, code, f"-{build}" if build else "")
        rows.append({"run": name, **({"build": build or "this"} if options.against else {}), "GPUs": options.ranks, **found})
        print(rows[-1], flush=True)
    dense = {row.get("build"): row["seconds a step"] for row in rows if row["run"] == "dense"}
    for row in rows:
        ours, theirs = row["seconds a step"], dense.get(row.get("build"))
        row["times dense"] = round(theirs / ours, 2) if theirs and ours else None
    write_csv(options.out / "training_step.csv", rows)
    (options.out / "summary.json").write_text(json.dumps({**environment(), "runs": rows}, indent=2) + "\n")
    print(json.dumps(rows, indent=2))
    if failed := [row["run"] for row in rows if row["status"]]:
        raise SystemExit(f"failed: {'; '.join(failed)}")


def measure(
    name: str, arguments: list[str], options: argparse.Namespace, more: list[str], code: Path = ROOT, mark: str = ""
) -> dict[str, Any]:
    """Median step time of the build in `code` after three warm-up steps, and peak memory, as Megatron logs them; None for a run
    that failed."""
    log = options.out / (re.sub(r"\W+", "-", name) + mark + ".log")
    given = one_rank()
    given["PYTHONPATH"] = os.pathsep.join([str(code), given["PYTHONPATH"]])
    if name == EDGES:
        arguments = [*arguments, "--lighthouse-edge-budget", str(2 * options.budget)]
    words = command(arguments, options, more)
    log.unlink(missing_ok=True)
    process = started(on_cpu(words) if options.tiny else words, log, given, code)
    try:
        status: int | str = process.wait(options.limit)
    except subprocess.TimeoutExpired:
        status = f"over {options.limit:.0f} s"
    finally:
        end([process])
    text = log.read_text(errors="replace")
    if status:
        print(f"{name}: status {status}\n{text[-3000:]}", flush=True)
    return {"status": status, **said(text, options.seq_length)}


def on_cpu(words: Sequence[str]) -> list[str]:
    """The same command, small, as a CPU can take it: in fp32, with local layers, without graphs."""
    pairs = zip(["", *words], words, strict=False)
    left = [word for before, word in pairs if word not in ON_GPU and before != "--cuda-graph-impl"]
    return [*left, *TINY.split()]


def command(arguments: list[str], options: argparse.Namespace, more: list[str]) -> list[str]:
    """What trains it, on `options.ranks` GPUs; where a flag stands twice, the last counts."""
    length = str(options.seq_length)
    sizes = ["--seq-length", length, "--max-position-embeddings", length, "--num-layers", str(options.layers)]
    budget = ["--lighthouse-budget", str(options.budget)] if options.budget else []
    return [
        *torchrun(options.ranks),
        *("-m", "megatron_lighthouse.pretrain_gpt", *MODEL, *sizes, *arguments),
        *("--context-parallel-size", str(options.ranks), "--high-priority-stream-groups", "cp"),
        *(*budget, "--train-iters", str(options.steps), *more),
        *("--data-cache-path", str(options.out / "data"), "--text-data", *default_text()),
    ]


def step_times(log: str) -> list[float]:
    """Seconds of the iterations that it has."""
    return [float(x) / 1000 for x in re.findall(r"elapsed time per iteration \(ms\): ([\d.]+)", log)]


def losses(log: str) -> list[float]:
    """Nats a token of the iterations that it has."""
    return [float(x) for x in re.findall(r"lm loss: ([\d.E+-]+)", log)]


def said(log: str, tokens: int, warm: int = 3) -> dict[str, Any]:
    """What a log says of a run with so many tokens a step, of which the first `warm` are not counted."""
    times = step_times(log)
    step = statistics.median(times[warm:]) if len(times) > warm else None
    each = losses(log)
    peaks, held = ([float(x) for x in re.findall(rf"max {kind}: ([\d.]+)", log)] for kind in ("allocated", "reserved"))
    graphs = [(float(x), float(y)) for x, y in re.findall(r"were captured in ([\d.]+) s; ([\d.]+) GiB", log)]
    return {
        "seconds a step": round(step, 4) if step else None,
        "tokens a second": round(tokens / step) if step else None,
        # Megatron logs MiB once, after the second step; the optimizer's state is there by then
        "peak GB": round(max(peaks) * 2**20 / 1e9, 2) if peaks else None,
        "peak GiB": round(max(peaks) / 1024, 2) if peaks else None,
        # what torch holds of the GPU without graphs, to compare with what it holds after they were captured
        "held GiB": round(max(held) / 1024, 2) if held else None,
        **({"captured in s": max(x for x, _ in graphs), "held GiB with graphs": max(x for _, x in graphs)} if graphs else {}),
        "first loss": each[0] if each else None,
        "last loss": each[-1] if each else None,
    }


if __name__ == "__main__":
    main()
