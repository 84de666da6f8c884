"""`python benchmarks/scorers.py --out FOLDER`: what each scorer costs on one GPU.

The whole layer, forward and forward with backward, by scorer, bf16, H = G = 8, D = 128; beside `norm` in the same run. Leaves
scorers.csv. `gla` is timed where its package is installed: its first call tunes for minutes.
"""

from __future__ import annotations

import argparse
import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from csv_tables import write_csv
from measure import median_ms
from torch import Tensor

from megatron_lighthouse import LighthouseConfig, lighthouse_attention
from megatron_lighthouse.lighthouse.scorers import SCORERS
from megatron_lighthouse.versions import environment

COUNTED = ("norm", "mass", "summary", "dilated", "gla")
COPIES = 3
"""Sets of inputs, taken in turn."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "scorers")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 98304, 262144])
    parser.add_argument("--scorers", nargs="+", choices=list(SCORERS), default=[s for s in COUNTED if s in SCORERS])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(1)
    rows: list[dict[str, Any]] = []
    for length, scorer in itertools.product(options.lengths, options.scorers):
        rows.append(_times(length, scorer))
        print(rows[-1], flush=True)
        write_csv(options.out / "scorers.csv", rows)
    (options.out / "scorers.json").write_text(json.dumps(environment(), indent=2) + "\n")


def _times(length: int, scorer: str) -> dict[str, Any]:
    config = LighthouseConfig(3, 4, length // 64, scorer=scorer)
    inputs = [[torch.randn(length, 1, 8, 128, device="cuda", dtype=torch.bfloat16) for _ in range(4)] for _ in range(COPIES)]

    def forward(tensors: list[Tensor]) -> Tensor:
        query, key, value, _ = tensors
        return lighthouse_attention(query, key, value, config)

    def both(tensors: list[Tensor]) -> tuple[Tensor, ...]:
        *leaves, grad = tensors
        query, key, value = (x.detach().requires_grad_() for x in leaves)
        return torch.autograd.grad(lighthouse_attention(query, key, value, config), (query, key, value), grad)

    return {
        **{"tokens": length, "scorer": scorer, "budget": config.budget},
        "forward ms": round(median_ms([partial(forward, x) for x in inputs]), 3),
        "forward+backward ms": round(median_ms([partial(both, x) for x in inputs]), 3),
    }


if __name__ == "__main__":
    main()
