"""`python benchmarks/causal.py --out FOLDER`: a causal selection beside the paper's, on one GPU.

First it must be right there: kernels choose what the reference chooses, and tokens from a cut on change no bit of an output
before it, bf16, selection not held fixed. Then milliseconds of selection alone (of the GPU, and from call to call, which the
host bounds) and of the whole layer, forward with backward; one sequence, H = G = 8, D = 128. Leaves causal.csv and causal.json.

`--device cpu` goes the whole way on a CPU by the reference, at a 32nd of the lengths, and times nothing.
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
from megatron_lighthouse.lighthouse import reference
from megatron_lighthouse.lighthouse.geometry import Geometry
from megatron_lighthouse.lighthouse.implementations import steps_for
from megatron_lighthouse.versions import environment

HEADS, DIM = 8, 128
LENGTHS = (16384, 98304, 524288, 1048576)
SHORTER = 32
STEPS = {"cuda": "kernels", "cpu": "reference"}


def check(tokens: int, device: str) -> None:
    """Raises RuntimeError where the kernels choose otherwise than the reference, or an output rests on a later token."""
    config = LighthouseConfig.for_length(tokens, causal_selection=True)
    geometry = config.geometry(tokens)
    query, key, value = (torch.randn(tokens, 2, heads, DIM, device=device, dtype=torch.bfloat16) for heads in (4, 2, 2))
    scores, steps = reference.score(query, key, geometry), steps_for(STEPS[device], query)
    ours, expected = steps.select(scores, geometry, True, True), reference.select(scores, geometry, True, True)
    if not (torch.equal(ours.places, expected.places) and torch.equal(ours.scattered, expected.scattered)):
        raise RuntimeError("kernels and reference choose otherwise")
    before = lighthouse_attention(query, key, value, config)
    for start in (tokens // 3, tokens // 2, tokens - 5):
        q, k, v = (torch.cat([x[:start], 3 * torch.randn_like(x[start:])]) for x in (query, key, value))
        if not torch.equal(before[:start], lighthouse_attention(q, k, v, config)[:start]):
            raise RuntimeError(f"tokens from {start} on change outputs before it")


def times(tokens: int, device: str) -> list[dict[str, float | int | bool]]:
    """Milliseconds, by whether the selection is causal; none on a CPU."""
    query, key, value, grad = (torch.randn(tokens, 1, HEADS, DIM, device=device, dtype=torch.bfloat16) for _ in range(4))
    leaves, rows, steps = [x.requires_grad_() for x in (query, key, value)], [], steps_for(STEPS[device], query)
    for causal in (False, True):
        config = LighthouseConfig.for_length(tokens, causal_selection=causal)
        geometry = config.geometry(tokens)
        scores = [torch.rand(2, 1, HEADS, geometry.coarse_length, device=device) for _ in range(4)]

        def select(i: int, geometry: Geometry = geometry, causal: bool = causal, scores: list[Tensor] = scores) -> object:
            return steps.select(scores[i], geometry, True, causal)

        def layer(config: LighthouseConfig = config) -> object:
            return torch.autograd.grad(lighthouse_attention(query, key, value, config), leaves, grad)

        row: dict[str, float | int | bool] = {"tokens": tokens, "causal": causal}
        if device == "cuda":
            row |= {"select": median_ms([partial(select, i) for i in range(4)]), "select_host": host_ms(partial(select, 0))}
            row |= {"layer": median_ms([layer]), "layer_host": host_ms(layer)}
        else:
            select(0), layer()
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "causal")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    options = parser.parse_args()
    shorter = 1 if options.device == "cuda" else SHORTER
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(1)
    check(LENGTHS[0] // shorter, options.device)
    print(f"{STEPS[options.device]}: chosen as the reference does, and no output rests on a later token", flush=True)
    rows = [row for length in options.lengths for row in times(length // shorter, options.device)]
    write_csv(options.out / "causal.csv", rows)
    (options.out / "causal.json").write_text(json.dumps({**environment(), "runs": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
