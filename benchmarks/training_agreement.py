"""`python benchmarks/training_agreement.py --out FOLDER`: do runs that must agree train alike on these GPUs?

One small GPT, 4,096 tokens, from the same seed, in fp32 with the same inner attention: `--lighthouse-steps kernels` against
`reference`; and on two GPUs or more, context parallel 2 against 1, by each scheme. In bf16 with Transformer Engine too, where
that is installed: there what differs is rounding. Leaves agreement.json with the losses of every step.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import torch
from measure import environment, one_rank

from megatron_lighthouse.plots import read_scalars
from megatron_lighthouse.recipe.presets import COMMON, LOCAL, default_text

MODEL = f"""
    {COMMON} --no-gradient-accumulation-fusion --distributed-backend nccl
    --num-layers 6 --hidden-size 512 --ffn-hidden-size 1024 --num-attention-heads 8 --group-query-attention
    --num-query-groups 4 --seq-length 4096 --max-position-embeddings 4096 --global-batch-size 2 --seed 7
    --lr 1e-3 --lr-warmup-iters 2 --eval-interval 1000 --attention lighthouse --lighthouse-budget 64
    --lighthouse-tile-budget 16
""".split()
FP32 = [*LOCAL.split(), "--lighthouse-inner", "sdpa"]
TE = "--bf16 --transformer-impl transformer_engine --attention-backend fused".split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "training_agreement")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, object] = {**environment(), "steps": options.steps}
    for title, base, others in _comparisons():
        expected = _losses(title, 1, base, options)
        rows: dict[str, object] = {"one rank": expected}
        result[title] = rows
        for name, (ranks, more) in others.items():
            found = _losses(f"{title} {name}", ranks, [*base, *more], options)
            distance = max(abs(a - b) for a, b in zip(expected, found, strict=True))
            rows[name] = {"greatest distance": distance, "losses": found}
            print(f"{title}, {name}: {expected[0]:.4f} to {expected[-1]:.4f}, greatest distance {distance:.2e}", flush=True)
            (options.out / "agreement.json").write_text(json.dumps(result, indent=2) + "\n")


def _comparisons() -> list[tuple[str, list[str], dict[str, tuple[int, list[str]]]]]:
    """Title, the arguments of one rank's run, and by name the ranks and the further arguments of those held to it."""
    several = torch.cuda.device_count() > 1
    schemes = {
        f"context parallel 2, {scheme}": (2, ["--context-parallel-size", "2", "--cp-comm-type", scheme])
        for scheme in ("p2p", "all_gather", "a2a")
        if several
    }
    reference = {"reference": (1, ["--lighthouse-steps", "reference"])}
    comparisons = [("fp32", FP32, {**reference, **schemes})]
    if several and importlib.util.find_spec("transformer_engine"):
        comparisons.append(("bf16, Transformer Engine", TE, schemes))
    return comparisons


def _losses(name: str, ranks: int, arguments: list[str], options: argparse.Namespace) -> list[float]:
    folder = options.out / "runs" / "".join(c if c.isalnum() else "-" for c in name)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [
        *(sys.executable, *launch, "-m", "megatron_lighthouse.pretrain_gpt", *MODEL, *arguments, "--eval-iters", "0"),
        *("--train-iters", str(options.steps), "--tensorboard-dir", str(folder)),
        *("--data-cache-path", str(options.out / "runs" / "data"), "--text-data", *default_text()),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=one_rank(), text=True)
    if done.returncode:
        raise SystemExit(done.stdout[-5000:])
    return [float(x) for x in read_scalars(folder)["lm loss"][1]]


if __name__ == "__main__":
    main()
