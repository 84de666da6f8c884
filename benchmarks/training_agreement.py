"""`python benchmarks/training_agreement.py --out FOLDER`: do runs that must agree train alike on these GPUs?

One small GPT, 4,096 tokens, from the same seed, in fp32 with the same inner attention: `--lighthouse-steps kernels` against
`reference`; and on two GPUs or more, context parallel 2 against 1, by each scheme. Where Transformer Engine is installed, the
schemes in bf16 too, where what differs is rounding; and on our own ring a run with full recompute, evaluations and a switch to
dense, whose messages go by copy engine or by NCCL: with --deterministic-mode both give the same bits, and when repeated. Also
every parallel layout that the GPUs have room for, against one GPU, all from one checkpoint. And one GPU with Megatron's CUDA
graphs against it without.
Leaves agreement.json with the losses of every step. --at-once runs several side by side: losses are compared, not times.
--layouts takes some of the layouts. --tiny RANKS tries it on a CPU, with as many processes as there are GPUs otherwise.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import torch
from h100_training import DETERMINISTIC

from megatron_lighthouse.context_parallel.schemes import SWITCH
from megatron_lighthouse.launch.torchrun import one_rank, torchrun
from megatron_lighthouse.plan.words import RECOMPUTE_WORDS
from megatron_lighthouse.plots import read_scalars
from megatron_lighthouse.recipe.presets import COMMON, LOCAL, ON_CPU, default_text
from megatron_lighthouse.versions import environment

MODEL = f"""
    {COMMON} --no-gradient-accumulation-fusion --distributed-backend nccl
    --num-layers 6 --hidden-size 512 --ffn-hidden-size 1024 --num-attention-heads 8 --group-query-attention
    --num-query-groups 4 --seq-length 4096 --max-position-embeddings 4096 --global-batch-size 2 --seed 7
    --lr 1e-3 --lr-warmup-iters 2 --attention lighthouse --lighthouse-budget 64 --lighthouse-tile-budget 16
""".split()
FP32 = [*LOCAL.split(), "--lighthouse-inner", "sdpa"]
TE = "--bf16 --transformer-impl transformer_engine --attention-backend fused".split()
RECOMPUTE = RECOMPUTE_WORDS["full"].split()
NCCL = {SWITCH: "0"}
START = "--finetune --no-load-optim --no-load-rng".split()
TINY = f"""
    {ON_CPU} --no-bias-swiglu-fusion --hidden-size 64 --ffn-hidden-size 128 --kv-channels 16
    --seq-length 512 --max-position-embeddings 512 --lighthouse-budget 8 --lighthouse-tile-budget 4
""".split()
TENSOR = "--tensor-model-parallel-size 2 --sequence-parallel"
LAYOUTS = {
    "TP 2": (2, TENSOR),
    "PP 2": (2, "--pipeline-model-parallel-size 2"),
    "DP 2": (2, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"),
    "CP 4": (4, "--context-parallel-size 4"),
    **{
        f"{name}, CP 2, {scheme}": (4, f"{words} --context-parallel-size 2 --cp-comm-type {scheme}")
        for name, words in (("TP 2", TENSOR), ("PP 2", "--pipeline-model-parallel-size 2"))
        for scheme in ("p2p", "all_gather", "a2a")
    },
    "DP 2, CP 2": (4, "--context-parallel-size 2"),
    "CP 8": (8, "--context-parallel-size 8"),
    "TP 4, CP 2": (8, "--tensor-model-parallel-size 4 --sequence-parallel --context-parallel-size 2"),
    "TP 2, CP 4": (8, f"{TENSOR} --context-parallel-size 4"),
    "PP 2, CP 4": (8, "--pipeline-model-parallel-size 2 --context-parallel-size 4"),
    "TP 2, PP 2, DP 2": (8, f"{TENSOR} --pipeline-model-parallel-size 2"),
}
"""GPUs, and Megatron's arguments, by name."""


@dataclass(frozen=True)
class Run:
    """A run of the entry point, for the first of a comparison or held to it."""

    name: str
    ranks: int = 1
    more: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Runs that must agree with the first of them."""

    title: str
    arguments: list[str]
    runs: list[Run]
    one_start: bool = False
    """Whether all start from one checkpoint: ranks of another layout would draw other weights from the same seed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "training_agreement")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", default="", help="comparisons whose title holds this; agreement.json keeps the others")
    parser.add_argument("--at-once", type=int, default=1, help="runs at a time (default: %(default)s)")
    parser.add_argument("--layouts", nargs="+", default=["*"], metavar="NAME", help="* stands for any letters")
    parser.add_argument("--tiny", type=int, default=0, metavar="RANKS")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "agreement.json"
    before = json.loads(path.read_text()) if options.only and path.exists() else {}
    result: dict[str, object] = {**before, **environment(), "steps": options.steps}
    failed = False
    with ThreadPoolExecutor(options.at_once) as pool:
        wanted = [one for one in comparisons(options) if options.only in one.title]
        starts = [pool.submit(_start, one, options) if one.one_start else None for one in wanted]
        started = []
        for one, start in zip(wanted, starts, strict=True):
            more = start.result() if start else []
            if more is None:
                failed = True
                continue
            started.append((one, [pool.submit(_losses, one, run, options, more) for run in one.runs]))
        for comparison, found in started:
            rows: dict[str, object] = {}
            result[comparison.title] = rows
            for run, future in zip(comparison.runs, found, strict=True):
                title, losses, expected = f"{comparison.title}, {run.name}", future.result(), found[0].result()
                failed |= not losses
                if not losses or not expected:
                    continue
                distance = max(abs(a - b) for a, b in zip(expected, losses, strict=True))
                rows[run.name] = {"greatest distance": distance, "losses": losses}
                print(f"{title}: {losses[0]:.4f} to {losses[-1]:.4f}, distance {distance:.2e}", flush=True)
                path.write_text(json.dumps(result, indent=2) + "\n")
    if failed:
        raise SystemExit(1)


def comparisons(options: argparse.Namespace) -> list[Comparison]:
    steps, gpus = options.steps, options.tiny or torch.cuda.device_count()
    one, reference = Run("one rank"), Run("reference", more=("--lighthouse-steps", "reference"))
    has_te = not options.tiny and importlib.util.find_spec("transformer_engine")
    graphs = [
        Run(how, 1, ("--cuda-graph-impl", how, *more), {"NCCL_GRAPH_REGISTER": "0"})
        for how, more in (
            ("local", ()),
            ("transformer_engine", ()),
            ("full_iteration", ("--no-check-for-nan-in-loss-and-grad",)),
        )
    ]
    graphed = [Comparison("bf16, CUDA graphs", TE, [one, *graphs])] if has_te else []
    if gpus < 2:
        return [Comparison("fp32", FP32, [one, reference]), *graphed]
    two = ("--context-parallel-size", "2", "--cp-comm-type")
    schemes = [Run(f"context parallel 2, {scheme}", 2, (*two, scheme)) for scheme in ("p2p", "all_gather", "a2a")]
    layouts = [
        Run(name, n, tuple(more.split()))
        for name, (n, more) in LAYOUTS.items()
        if n <= gpus and any(fnmatch(name, one) for one in options.layouts)
    ]
    found = [
        Comparison("fp32", FP32, [one, reference, *schemes]),
        Comparison("layouts, fp32", FP32, [one, *layouts], one_start=True),
    ]
    if has_te:
        # an evaluation before the switch and one after it
        whole = [*TE, *RECOMPUTE, "--lighthouse-stage2-at", str(3 * steps // 5), "--eval-interval", str(steps // 2)]
        exact = [*whole, "--eval-iters", "2", "--deterministic-mode", "--lighthouse-inner", "fa2"]
        rounded = [*whole, "--eval-iters", "2", "--lighthouse-inner", "cudnn"]
        p2p = (*two, "p2p")
        found += [
            Comparison("bf16, Transformer Engine", TE, [one, *schemes]),
            Comparison("layouts, bf16, Transformer Engine", TE, [one, *layouts], one_start=True),
            Comparison(
                "bf16, our own ring, --deterministic-mode",
                exact,
                [
                    Run("copies", 2, p2p, DETERMINISTIC),
                    Run("copies again", 2, p2p, DETERMINISTIC),
                    Run("NCCL", 2, p2p, {**DETERMINISTIC, **NCCL}),
                ],
            ),
            Comparison("bf16, our own ring, cuDNN", rounded, [Run("copies", 2, p2p), Run("NCCL", 2, p2p, NCCL), one]),
        ]
    return found + graphed


def _start(comparison: Comparison, options: argparse.Namespace) -> list[str] | None:
    """Arguments of a run that starts from a checkpoint of one rank, which is made here by one step; None where that fails."""
    folder = _folder(comparison, "start", options)
    more = "--train-iters 1 --lr-warmup-iters 0 --no-save-optim".split()
    ended = _trains(comparison, Run("start"), folder, more, options.tiny)
    return ["--load", str(folder / "checkpoints"), *START] if ended else None


def _losses(comparison: Comparison, run: Run, options: argparse.Namespace, more: Sequence[str] = ()) -> list[float]:
    """The training losses of every step, then the validation losses; none, and the end of the log, of a run that failed."""
    folder = _folder(comparison, run.name, options)
    ended = _trains(comparison, run, folder, ["--train-iters", str(options.steps), *more], options.tiny)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    if not ended:
        return []
    scalars = read_scalars(folder / "tensorboard")
    return [float(x) for name in ("lm loss", "lm loss validation") if name in scalars for x in scalars[name][1]]


def _folder(comparison: Comparison, name: str, options: argparse.Namespace) -> Path:
    folder: Path = options.out / "runs" / "".join(c if c.isalnum() else "-" for c in f"{comparison.title} {name}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def command(comparison: Comparison, run: Run, folder: Path, more: Sequence[str], tiny: int) -> list[str]:
    """What trains it in `folder`."""
    evaluation = [] if "--eval-iters" in comparison.arguments else ["--eval-iters", "0", "--eval-interval", "1000"]
    return [
        *torchrun(run.ranks),
        *("-m", "megatron_lighthouse.pretrain_gpt", *MODEL, *evaluation, *comparison.arguments, *run.more, *more),
        *("--save", str(folder / "checkpoints"), "--save-interval", "1000"),  # at the switch, and at the end
        *("--tensorboard-dir", str(folder / "tensorboard")),
        *("--data-cache-path", str(folder / "data"), *(TINY if tiny else []), "--text-data", *default_text()),
    ]


def _trains(comparison: Comparison, run: Run, folder: Path, more: Sequence[str], tiny: int) -> bool:
    """Whether it ends well; if not, prints the end of its log."""
    words = command(comparison, run, folder, more, tiny)
    log = folder / "log.txt"
    with log.open("w") as file:
        done = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT, env={**one_rank(), **run.environment})
    if done.returncode:
        print(f"{log} ends with\n{log.read_text(errors='replace')[-5000:]}", flush=True)
    return not done.returncode


if __name__ == "__main__":
    main()
