"""`python benchmarks/causal.py --out FOLDER`: a causal selection beside the paper's, on one GPU.

First it must be right there: kernels choose what the reference chooses, and tokens from a cut on change no bit of an output
before it, bf16, selection not held fixed. Then milliseconds of selection alone (of the GPU, and from call to call, which the
host bounds) and of the whole layer, forward with backward; one sequence, H = G = 8, D = 128. Leaves causal.csv and causal.json.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from csv_tables import write_csv
from measure import host_ms, median_ms
from torch import Tensor

from megatron_lighthouse import LighthouseConfig, lighthouse_attention
from megatron_lighthouse.kernels import lighthouse as kernels
from megatron_lighthouse.lighthouse import reference
from megatron_lighthouse.lighthouse.geometry import Geometry
from megatron_lighthouse.versions import environment

HEADS, DIM = 8, 128
LENGTHS = (16384, 98304, 524288, 1048576)


def check(tokens: int = 16384, dim: int = DIM) -> None:
    """Raises RuntimeError where the kernels choose otherwise than the reference, or an output rests on a later token."""
    config = LighthouseConfig.for_length(tokens, causal_selection=True)
    geometry = config.geometry(tokens)
    query, key, value = (torch.randn(tokens, 2, heads, dim, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2))
    scores = reference.score(query, key, geometry)
    ours, expected = kernels.select(scores, geometry, True, True), reference.select(scores, geometry, True, True)
    if not (torch.equal(ours.places, expected.places) and torch.equal(ours.scattered, expected.scattered)):
        raise RuntimeError("kernels and reference choose otherwise")
    before = lighthouse_attention(query, key, value, config)
    for start in (tokens // 3, tokens // 2, tokens - 5):
        q, k, v = (torch.cat([x[:start], 3 * torch.randn_like(x[start:])]) for x in (query, key, value))
        if not torch.equal(before[:start], lighthouse_attention(q, k, v, config)[:start]):
            raise RuntimeError(f"tokens from {start} on change outputs before it")


def times(tokens: int) -> list[dict[str, float | int | bool]]:
    """Milliseconds, by whether the selection is causal."""
    query, key, value, grad = (torch.randn(tokens, 1, HEADS, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    leaves, rows = [x.requires_grad_() for x in (query, key, value)], []
    for causal in (False, True):
        config = LighthouseConfig.for_length(tokens, causal_selection=causal)
        geometry = config.geometry(tokens)
        scores = [torch.rand(2, 1, HEADS, geometry.coarse_length, device="cuda") for _ in range(4)]

        def select(i: int, geometry: Geometry = geometry, causal: bool = causal, scores: list[Tensor] = scores) -> object:
            return kernels.select(scores[i], geometry, True, causal)

        def layer(config: LighthouseConfig = config) -> object:
            return torch.autograd.grad(lighthouse_attention(query, key, value, config), leaves, grad)

        row = {"tokens": tokens, "causal": causal, "select": median_ms([partial(select, i) for i in range(4)])}
        row |= {"select_host": host_ms(partial(select, 0)), "layer": median_ms([layer]), "layer_host": host_ms(layer)}
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "causal")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(1)
    check()
    print("kernels choose as the reference does, and no output rests on a later token", flush=True)
    rows = [row for length in options.lengths for row in times(length)]
    write_csv(options.out / "causal.csv", rows)
    (options.out / "causal.json").write_text(json.dumps({**environment(), "runs": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
