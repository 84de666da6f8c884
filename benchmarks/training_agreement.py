"""`python benchmarks/training_agreement.py --out FOLDER`: do the kernels and the reference train alike, in fp32, on this GPU?

One small GPT, 4,096 tokens, 20 steps from the same seed, with `--lighthouse-steps kernels` and `reference`; with the same
inner attention. Leaves agreement.json with both losses of every step.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from measure import environment, one_rank

from megatron_lighthouse.plots import read_scalars
from megatron_lighthouse.recipe.presets import COMMON, LOCAL, default_text

MODEL = f"""
    {COMMON} {LOCAL} --no-gradient-accumulation-fusion --distributed-backend nccl
    --num-layers 6 --hidden-size 512 --ffn-hidden-size 1024 --num-attention-heads 8 --group-query-attention
    --num-query-groups 4 --seq-length 4096 --max-position-embeddings 4096 --global-batch-size 2 --train-iters 20 --seed 7
    --lr 1e-3 --lr-warmup-iters 2 --eval-interval 1000 --attention lighthouse --lighthouse-budget 64
    --lighthouse-tile-budget 64 --lighthouse-inner sdpa
""".split()


def losses(steps: str, out: Path) -> list[float]:
    command = [
        *(sys.executable, "-m", "megatron_lighthouse.pretrain_gpt", *MODEL, "--lighthouse-steps", steps, "--eval-iters", "0"),
        *("--tensorboard-dir", str(out / steps), "--data-cache-path", str(out / "data"), "--text-data", *default_text()),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=one_rank(), text=True)
    if done.returncode:
        raise SystemExit(done.stdout[-3000:])
    return [float(x) for x in read_scalars(out / steps)["lm loss"][1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "training_step")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    kernels, reference = losses("kernels", options.out), losses("reference", options.out)
    greatest = max(abs(a - b) for a, b in zip(kernels, reference, strict=True))
    result = {**environment(), "greatest distance": greatest, "kernels": kernels, "reference": reference}
    (options.out / "agreement.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"{len(kernels)} steps in fp32, losses {kernels[0]:.4f} to {kernels[-1]:.4f}: greatest distance {greatest:.2e}")


if __name__ == "__main__":
    main()
