"""`python benchmarks/rope.py --out FOLDER`: what turning pooled rows on to their window's last token costs, on one GPU.

The whole layer, forward with backward, bf16, one sequence, H = G = 8, D = 128, by the two ways of --lighthouse-rope in one run:
`mean` averages rows as they come, `last` turns them, channels paired by halves or by neighbours. First the kernels are held to
the float64 reference on a small shape. Each repetition takes inputs drawn anew, and all ways take turns. Leaves rope.csv and
rope.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from csv_tables import write_csv
from torch import Tensor

from megatron_lighthouse import LighthouseConfig, lighthouse_attention
from megatron_lighthouse.lighthouse.attention import attended_rows
from megatron_lighthouse.lighthouse.rotary import Rotary
from megatron_lighthouse.lighthouse.selection import Selection
from megatron_lighthouse.variant import Place
from megatron_lighthouse.versions import environment

HEADS, DIM, BASE = 8, 128, 500_000
SHAPES = {98304: 1536, 524288: 4096}
"""Budgets, by tokens."""
PROMISED = 0.03
"""How much more than with `mean` the layer may cost."""
WARM_UP = 3
TOLERANCE = 3e-2
"""Of the greatest element: rows, attention, result and gradients in bf16, some roundings of 3.9e-3."""


def ways(dim: int) -> dict[str, Rotary | None]:
    """What `rotary` is, by name."""
    inv_freq = BASE ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return {"mean": None, "last, halves": Rotary(inv_freq), "last, neighbours": Rotary(inv_freq, interleaved=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "rope")
    parser.add_argument("--lengths", type=int, nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=30, help="of each way; at least 20")
    options = parser.parse_args()
    if options.repeats < 20:
        parser.error(f"--repeats {options.repeats} must be at least 20: use 30.")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(1)
    checked = check()
    print("worst error over the greatest element, on a small shape:", checked, flush=True)
    rows = [row for length in options.lengths for row in times(length, options.repeats)]
    write_csv(options.out / "rope.csv", rows)
    found = {**environment(), "promised": PROMISED, "checked": checked, "runs": rows}
    (options.out / "rope.json").write_text(json.dumps(found, indent=2) + "\n")


def inputs_of(tokens: int, heads: int, dim: int, device: str = "cuda") -> list[Tensor]:
    """q, k, v and the output's gradient, bf16."""
    return [torch.randn(tokens, 1, heads, dim, device=device, dtype=torch.bfloat16) for _ in range(4)]


def both(
    tensors: list[Tensor], config: LighthouseConfig, rotary: Rotary | None, selection: Selection | None = None
) -> list[Tensor]:
    """Output, and the gradients of q, k and v."""
    *leaves, grad = tensors
    query, key, value = (x.detach().requires_grad_() for x in leaves)
    out = lighthouse_attention(query, key, value, config, rotary=rotary, selection=selection)
    return [out.detach(), *torch.autograd.grad(out, (query, key, value), grad)]


def check(device: str = "cuda") -> dict[str, float]:
    """The greatest error of output and gradients against float64 and plain PyTorch, by way.

    Raises:
        RuntimeError: one beyond TOLERANCE.
    """
    config, found = LighthouseConfig(3, 4, 64, 16), dict[str, float]()
    for name, rotary in ways(64).items():
        tensors = inputs_of(2048, 2, 64, device)
        wide, reference = [x.double() for x in tensors], config.replace(steps="reference", inner="sdpa")
        # float64 scores may rank near ties otherwise: both attend to what the reference selects
        query, key, value, _ = wide
        selection = attended_rows(query, key, value, reference, Place(rotary=rotary)).selection
        pairs = zip(both(tensors, config, rotary, selection), both(wide, reference, rotary, selection), strict=True)
        found[name] = max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs)
        if not found[name] <= TOLERANCE:
            raise RuntimeError(f"{name}: off by {found[name]:.3g} of the greatest element, more than {TOLERANCE}")
    return found


def times(length: int, repeats: int) -> list[dict[str, Any]]:
    """Median milliseconds by way, which take turns, each time on inputs drawn anew."""
    config, measured = LighthouseConfig(3, 4, SHAPES[length]), {name: list[float]() for name in ROTARIES}
    for turn in range(WARM_UP + repeats):
        for name, rotary in ROTARIES.items():
            tensors = inputs_of(length, HEADS, DIM)
            milliseconds = timed(tensors, config, rotary)
            if turn >= WARM_UP:
                measured[name].append(milliseconds)
    mean = statistics.median(measured["mean"])
    rows = []
    for name, found in measured.items():
        median = statistics.median(found)
        rows.append(
            {
                **{"tokens": length, "budget": config.budget, "rows at": name, "repetitions": len(found)},
                **{
                    "forward+backward ms": round(median, 3),
                    "least ms": round(min(found), 3),
                    "over mean": round(median / mean, 4),
                },
            }
        )
        print(rows[-1], flush=True)
    return rows


ROTARIES = ways(DIM)
"""Made once, as a model does: each keeps its tables."""


def timed(tensors: list[Tensor], config: LighthouseConfig, rotary: Rotary | None) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(40_000_000)  # for the host to get ahead: what is measured is the GPU
    start.record()
    both(tensors, config, rotary)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


if __name__ == "__main__":
    main()
