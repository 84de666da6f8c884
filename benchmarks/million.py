"""`python benchmarks/million.py --out FOLDER`: a million tokens in one sequence on one GPU, and what tiles cost.

Qwen3-0.6B's shape (tied embeddings, queries and keys normed), every layer Lighthouse, bf16, Adam with fp32 state, full
recompute, random tokens of the whole vocabulary; Transformer Engine where it is installed. Its runs are five kinds:

    0.6b-LENGTH…     131,072 (k = 1,024), 524,288 and 1,048,576 tokens (k = 4,096)
    tiling-…         32,768 tokens, which fit without tiles: without, with tiles of the loss, and of the MLPs too
    before-LENGTH    without tiles, from 16,384 tokens by doubling, until one does not fit; of another checkout: --before PATH
    parity-…         16,384 tokens, 50 steps at lr 1e-5: without tiles, again, with tiles of the loss, of MLPs, of both; and
                     dense without and with. Every loss and norm of a gradient is in summary.json
    8b-LENGTH-…      layers of Qwen3-8B's shape, dense and Lighthouse: a layer is what 4 take more than 1

each in a process of its own through `megatron_lighthouse.pretrain_gpt`. `--runs '0.6b-*' tiling-32768` takes some of them, in
that order; none goes on beyond `--within` seconds. One that fails leaves the end of its log and the others go on. Leaves
million.csv, layers.csv, summary.json, million.png and the logs. What else is given goes to every run. `--tiny` tries all of it
on a CPU, at a 512th of the length.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy
from csv_tables import write_csv
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_lighthouse.launch.torchrun import ROOT, one_rank
from megatron_lighthouse.recipe.presets import ON_CPU

VOCABULARY = 151936
COMMON = f"""
    --group-query-attention --num-query-groups 8 --kv-channels 128 --qk-layernorm
    --position-embedding-type rope --rotary-base 1000000 --normalization RMSNorm --norm-epsilon 1e-6 --disable-bias-linear
    --swiglu --attention-dropout 0 --hidden-dropout 0 --no-gradient-accumulation-fusion
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1 --no-create-attention-mask-in-dataloader
    --micro-batch-size 1 --global-batch-size 1 --lr 1e-4 --lr-decay-style constant --clip-grad 1.0 --seed 7
    --log-interval 1 --eval-iters 0 --eval-interval 100000 --split 100,0,0 --num-workers 0
    --tokenizer-type NullTokenizer --vocab-size {VOCABULARY - 1}
"""
MODELS = {
    "0.6b": "--num-layers 28 --hidden-size 1024 --ffn-hidden-size 3072 --num-attention-heads 16",
    "8b": "--hidden-size 4096 --ffn-hidden-size 12288 --num-attention-heads 32 --untie-embeddings-and-output-weights",
}
ENGINE = "--transformer-impl transformer_engine --attention-backend fused"
LOCAL = "--transformer-impl local --no-persist-layer-norm --no-masked-softmax-fusion"
GPU = "--bf16 --distributed-backend nccl"
TINY = f"""
    {ON_CPU} --no-bias-swiglu-fusion --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --num-query-groups 2
    --kv-channels 16 --lighthouse-tile-budget 4
"""
SHORTER = 512
"""How much shorter the sequences of --tiny are."""
LISTS = ("losses", "norms")
"""What a row has of every step: in summary.json alone."""
UNTILED = ("--loss-tile-tokens", "0")
MLP_TILES = 65536
LAYERS = (1, 4)
PARITY = (
    ("none", "lighthouse", False, 0),
    ("again", "lighthouse", False, 0),
    ("loss", "lighthouse", True, 0),
    ("mlp", "lighthouse", False, 2**12),
    ("tiles", "lighthouse", True, 2**12),
    ("dense-none", "dense", False, 0),
    ("dense-tiles", "dense", True, 2**12),
)
"""Name, attention, whether the loss is in tiles, and tokens in those of MLPs."""


@dataclass(frozen=True)
class Case:
    """One run: what is trained, and how."""

    name: str
    model: str
    length: int
    steps: int
    attention: str = "lighthouse"
    layers: int = 28
    levels: int = 3
    budget: int = 0
    """0: what the length asks for."""
    loss_tiles: bool = True
    """What the length asks for; else none."""
    mlp_tiles: int = 0
    before: bool = False
    """Of the checkout that has no tiles, where one is given."""
    more: str = ""
    """Further words of its command line."""


def cases() -> Iterator[Case]:
    """All of them, the most wanted first."""
    for length, steps, levels, budget in ((2**17, 6, 3, 1024), (2**20, 4, 4, 4096), (2**19, 4, 3, 4096)):
        tiles = MLP_TILES if length == 2**20 else 0
        yield Case(f"0.6b-{length}", "0.6b", length, steps, levels=levels, budget=budget, mlp_tiles=tiles)
    yield Case("tiling-32768-none", "0.6b", 2**15, 12, loss_tiles=False)
    yield Case("tiling-32768-loss", "0.6b", 2**15, 12)
    yield Case("tiling-32768-loss-mlp", "0.6b", 2**15, 12, mlp_tiles=2**13)
    yield Case(f"0.6b-{2**20}-whole-mlp", "0.6b", 2**20, 4, levels=4, budget=4096)
    for name, attention, loss, mlp in PARITY:
        yield Case(f"parity-16384-{name}", "0.6b", 2**14, 50, attention, loss_tiles=loss, mlp_tiles=mlp, more="--lr 1e-5")
    for length in (2**n for n in range(14, 21)):
        yield Case(f"before-{length}", "0.6b", length, 4, budget=length // 128, loss_tiles=False, before=True)
    for length in (2**17, 2**18):
        for attention in ("lighthouse", "dense"):
            for layers in LAYERS[::-1]:
                yield Case(f"8b-{length}-{attention}-{layers}", "8b", length, 5, attention, layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "million")
    parser.add_argument("--runs", nargs="+", default=["*"], metavar="NAME", help="which, in order; * stands for any letters")
    parser.add_argument("--before", type=Path, help="another checkout, for the runs without tiles")
    parser.add_argument("--within", type=float, default=3600, metavar="SECONDS", help="what goes on after them is ended")
    parser.add_argument("--list", action="store_true", help="name the runs, and stop")
    parser.add_argument("--tiny", action="store_true")
    options, more = parser.parse_known_args()
    known = list(cases())
    wanted = list(dict.fromkeys(case for pattern in options.runs for case in known if fnmatch(case.name, pattern)))
    if options.list or not wanted:
        raise SystemExit("\n".join(case.name for case in known) if options.list else f"--runs {options.runs}: see --list")
    end = time.monotonic() + options.within
    options.out = options.out.resolve()
    environment = prepare(options.out / "data")
    rows: list[dict[str, Any]] = []
    for case in wanted:
        if case.before and any(row["before"] and row["status"] != "trained" for row in rows):
            continue  # one of half the length did not fit
        code = options.before.resolve() if case.before and options.before else ROOT
        row = measured(command(case, options, more), options.out / f"{case.name}.log", end, case.length, code)
        rows.append({**asdict(case), **row})
        print({name: value for name, value in rows[-1].items() if name not in ("model", "before", *LISTS)}, flush=True)
        keep(rows, options.out)
        (options.out / "summary.json").write_text(json.dumps({**environment, "runs": rows}, indent=2) + "\n")
    draw(rows, options.out / "million.png")


def prepare(folder: Path, rows: int = VOCABULARY) -> dict[str, object]:
    """Write tokens of so many rows' vocabulary; answers device and versions."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # what it holds of the GPU ends with it
        return pool.apply(_prepare, (folder, rows))


def _prepare(folder: Path, rows: int) -> dict[str, object]:
    from megatron_lighthouse.mcore.data.write import write_dataset
    from megatron_lighthouse.versions import environment

    folder.mkdir(parents=True, exist_ok=True)
    random = numpy.random.default_rng(7)
    documents = (random.integers(0, rows - 1, 2**16, dtype=numpy.int32) for _ in range(128))
    write_dataset(str(folder / "random"), documents, numpy.int32)
    return environment()


def command(case: Case, options: argparse.Namespace, more: list[str]) -> list[str]:
    """What trains it. Where a flag stands twice, the last counts."""
    length = max(256, case.length // SHORTER) if options.tiny else case.length
    words = [*COMMON.split(), *MODELS[case.model].split(), "--num-layers", str(2 if options.tiny else case.layers)]
    words += (ENGINE if find_spec("transformer_engine") else LOCAL).split()
    words += ["--seq-length", str(length), "--max-position-embeddings", str(length), "--train-iters", str(case.steps)]
    words += ["--attention", case.attention]
    if case.attention == "lighthouse":
        words += ["--lighthouse-dense-first", "0", "--lighthouse-dense-last", "0"]
        if case.budget:
            budget = 8 if options.tiny else case.budget
            words += ["--lighthouse-levels", str(case.levels), "--lighthouse-budget", str(budget)]
    if not case.before or not options.before:
        words += [] if case.loss_tiles else UNTILED
        words += ["--mlp-tile-tokens", str(case.mlp_tiles // (SHORTER if options.tiny else 1))] if case.mlp_tiles else []
    words += [*(TINY if options.tiny else GPU).split(), *case.more.split()]
    data = ["--data-path", str(options.out / "data" / "random"), "--data-cache-path", str(options.out / "data" / "cache")]
    return [sys.executable, "-m", "megatron_lighthouse.pretrain_gpt", *words, *more, *data]


def measured(words: list[str], log: Path, end: float, tokens: int, code: Path = ROOT) -> dict[str, Any]:
    """A run of `code`, ended at `end`. Times are medians over the steps after the second, which warm up too."""
    begun = time.monotonic()
    paths = {"PYTHONPATH": os.pathsep.join([str(code), os.environ.get("PYTHONPATH", "")])}
    if end <= begun:
        return {"status": "no time was left"}
    with log.open("w") as file:
        run = subprocess.Popen(
            words,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=log.parent / "data",  # not this checkout: python -m looks where it stands first
            start_new_session=True,
            env={**one_rank(), **paths},
        )
        try:
            status = "trained" if run.wait(end - begun) == 0 else f"ended with {run.returncode}"
        except subprocess.TimeoutExpired:
            status = "no time was left"
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)
                run.wait()
    text = log.read_text(errors="replace")
    if status != "trained":
        print(f"{log.stem}: {status}\n{text[-2500:]}", flush=True)
        status = "out of memory" if "out of memory" in text else status
    times = [float(x) / 1000 for x in re.findall(r"elapsed time per iteration \(ms\): ([\d.]+)", text)]
    losses, norms = ([float(x) for x in re.findall(rf"{of}: ([\d.E+-]+)", text)] for of in ("lm loss", "grad norm"))
    peaks = {name: [float(x) / 1024 for x in re.findall(rf"max {name}: ([\d.]+)", text)] for name in ("allocated", "reserved")}
    counted = times[2:]
    step = statistics.median(counted) if counted else None
    return {
        "status": status,
        "seconds a step": round(step, 4) if step else None,
        "slowest": round(max(counted), 4) if counted else None,
        "first step": times[0] if times else None,
        "steps counted": len(counted),
        "tokens a second": round(tokens / step) if step else None,
        # Megatron logs MiB after the second step: the optimizer's state is there by then
        **{f"peak GiB {name}": round(max(found), 3) if found else None for name, found in peaks.items()},
        "first loss": losses[0] if losses else None,
        "last loss": losses[-1] if losses else None,
        "losses": losses,
        "norms": norms,
        "seconds in all": round(time.monotonic() - begun, 1),
    }


def layers(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Seconds and GiB of a layer: what more of them take more."""
    few, many = LAYERS
    found = {(row["length"], row["attention"], row["layers"]): row for row in rows if row["model"] == "8b"}
    for (length, attention, count), row in found.items():
        less = found.get((length, attention, few))
        if count == many and less and row.get("seconds a step") and less.get("seconds a step"):
            of = {"seconds a layer": "seconds a step", "GiB a layer": "peak GiB allocated"}
            more = {name: round(((row[key] or 0) - (less[key] or 0)) / (many - few), 4) for name, key in of.items()}
            yield {"length": length, "attention": attention, **more}


def keep(rows: list[dict[str, Any]], out: Path) -> None:
    """What is known so far: a call may be cut off."""
    for name, table in (("million", rows), ("layers", list(layers(rows)))):
        if table:
            write_csv(out / f"{name}.csv", table, LISTS)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Memory and time against length, of each kind of run."""
    series: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row.get("seconds a step") and not row["name"].startswith(("tiling", "parity")):
            of = f"{row['attention']}, {row['layers']} layers" if row["model"] == "8b" else "in tiles"
            series.setdefault(f"{row['model']} {'without tiles' if row['before'] else of}", []).append(row)
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, key in zip(figure.subplots(1, 2), ("peak GiB allocated", "seconds a step"), strict=True):
        for name, found in series.items():
            points = sorted((row["length"], row[key] or numpy.nan) for row in found)
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set(xlabel="tokens in a sequence", ylabel=key)
        axes.set_xscale("log", base=2)
        if any(row[key] for found in series.values() for row in found):  # a CPU has no peak
            axes.set_yscale("log")
        axes.grid(visible=True, which="both", alpha=0.3)
        if series:
            axes.legend(frameon=False)
    FigureCanvasAgg(figure).print_png(path)


if __name__ == "__main__":
    main()
