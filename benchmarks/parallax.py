"""`python benchmarks/parallax.py --out FOLDER`: one layer of Parallax on one GPU, beside dense attention and others' kernels.

Ours, flash-linear-attention's where it is installed, and cuDNN's dense attention, in the same run: forward and forward with
backward, bf16, with the rate of the products that they need (4 forward, 11 backward in ours; dense: 2 and 5). Before that the
errors of each against float64 over a short sequence, with keys that share a mean and without one, and whether repeats give the
same bits. At 98,304 tokens Lighthouse around Parallax too, k = 1536, and around softmax. Leaves parallax.csv and parallax.json.
`--blocks` tries other tiles than the table's, which is by such trials on an H200. What decided there: 64 rows to each four
warps, so that products are wgmma with operands from registers; and an order of them that hardly spills in the loop over whole
tiles (dr after dq: 8.7 ms; before it: 11.7).
"""

from __future__ import annotations

import argparse
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from csv_tables import write_csv
from one_layer import AROUND_FROM, CASES, COPIES, Case, Layer, around, of_length, repeats, timed
from torch import Tensor

from megatron_lighthouse import lighthouse_attention
from megatron_lighthouse.kernels.parallax.tiles import Blocks
from megatron_lighthouse.parallax.attention import parallax_attention
from megatron_lighthouse.softmax.backends import inner_attention
from megatron_lighthouse.versions import environment

PRODUCTS = {"ours": (4, 11), "fla": (4, 11), "dense": (2, 5), "around": (4, 11), "lighthouse": (2, 5)}
"""Matrix products of N²/2 x D multiply-adds a head, forward and backward; of the last two over the gathered rows."""
AROUND = around("parallax")
ERROR_TOKENS = 1024


def inputs_of(case: Case, r: float = 0.3, mean: float = 0.0) -> list[Tensor]:
    """q, r, k, v, bf16, with gradients: [N, 1, H, D] and [N, 1, G, D]."""
    how: dict[str, Any] = {"device": "cuda", "dtype": torch.float32}
    query, of_r, key, value = (
        torch.randn(case.tokens, 1, n, case.dim, **how) for n in (case.heads, case.heads, case.groups, case.groups)
    )
    return [x.to(torch.bfloat16).requires_grad_() for x in (query, r * of_r, key + mean, value)]


def layers(inputs: list[Tensor]) -> dict[str, Layer]:
    """What can run here, by name."""
    dense = inner_attention("cudnn", inputs[0], inputs[2])
    found: dict[str, Layer] = {"ours": parallax_attention, "dense": lambda q, r, k, v: dense(q, k, v)}
    if len(inputs[0]) >= AROUND_FROM:
        found["around"] = lambda q, r, k, v: lighthouse_attention(q, k, v, AROUND, streams=[r])
        found["lighthouse"] = lambda q, r, k, v: lighthouse_attention(q, k, v, AROUND.replace(around="softmax"))
    try:
        parallel_parallax = import_module("fla.ops.parallax").parallel_parallax
    except ImportError as error:
        print(f"fla is left out: {error}")
        return found

    def fla(*rows: Tensor) -> Tensor:
        out: Tensor = parallel_parallax(*(x.transpose(0, 1) for x in rows))
        return out.transpose(0, 1)

    return {**found, "fla": fla}


def time_case(case: Case) -> list[dict[str, Any]]:
    """Milliseconds and teraflops a second of each."""
    sets = [inputs_of(case) for _ in range(COPIES)]
    rows = []
    for name, layer in layers(sets[0]).items():
        gathers = name in ("around", "lighthouse")
        attended = AROUND.geometry(case.tokens).gathered_length if gathers else case.tokens
        product = attended**2 * case.heads * case.dim  # N²/2 x D multiply-adds, two operations each
        forward, backward = (n * product for n in PRODUCTS[name])
        found = timed(name, layer, sets)
        for (direction, ms), flops in zip(found.ms.items(), (forward, forward + backward), strict=True):
            row = {**case._asdict(), "what": name, "direction": direction, "ms": round(ms, 3)}
            rows.append({**row, "tflops": round(flops / ms / 1e9, 1), "peak_gib": round(found.peak_gib, 3)})
            print(rows[-1], flush=True)
    return rows


def errors(dim: int, size: float, mean: float) -> dict[str, dict[str, float]]:
    """Of output and gradients, relative to their norms, against ours in float64: of ours in bf16 and of dense attention."""
    inputs = inputs_of(Case(ERROR_TOKENS, 4, 2, dim), size, mean)
    grad = torch.randn_like(inputs[0])
    found: dict[str, dict[str, float]] = {}
    for name, layer in layers(inputs).items():
        rows = [x.detach() if name != "dense" or i != 1 else torch.zeros_like(x) for i, x in enumerate(inputs)]
        wide = [x.double().requires_grad_() for x in rows]
        given = [x.clone().requires_grad_() for x in rows]
        exact, out = parallax_attention(*wide), layer(*given)
        expected = [exact, *torch.autograd.grad(exact, wide, grad.double())]
        grads = torch.autograd.grad(out, given, grad, materialize_grads=True, allow_unused=True)
        compared = zip(("out", "dq", "dr", "dk", "dv"), (out, *grads), expected, strict=True)
        found[name] = {
            what: round(float((a.double() - b).norm() / b.norm()), 6)
            for what, a, b in compared
            if name != "dense" or what != "dr"
        }
    return found


def take_blocks(kernel: str, *blocks: int) -> None:
    """Have a kernel of ours take these tiles, whatever the table says."""
    for name in ("forward", "backward"):
        module: Any = import_module(f"megatron_lighthouse.kernels.parallax.{name}")
        before = module.blocks_of
        module.blocks_of = lambda which, *given, before=before: Blocks(*blocks) if which == kernel else before(which, *given)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "parallax")
    parser.add_argument("--lengths", type=int, nargs="+", help="instead of the cases' own: of 8 heads of 128")
    parser.add_argument(
        "--case",
        type=int,
        nargs=4,
        action="append",
        metavar=("TOKENS", "HEADS", "GROUPS", "DIM"),
        help="instead; several times",
    )
    parser.add_argument("--only-times", action="store_true", help="no checks")
    parser.add_argument("--only-checks", action="store_true", help="no times")
    parser.add_argument(
        "--blocks",
        nargs=5,
        action="append",
        default=[],
        metavar=("KERNEL", "QUERIES", "KEYS", "WARPS", "STAGES"),
        help="tiles of the kernel forward, queries or keys; several times for several",
    )
    options = parser.parse_args()
    for kernel, *blocks in options.blocks:
        take_blocks(kernel, *map(int, blocks))
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(1)
    checked = {
        f"D={dim}, r={size}, mean {mean}": errors(dim, size, mean)
        for dim in (() if options.only_times else (128, 64, 80))
        for size in (0.3, 1.0, 3.0)
        for mean in (0.0, 10.0)
    }
    print(json.dumps(checked, indent=2), flush=True)
    same = None if options.only_times else repeats(parallax_attention, inputs_of(Case(2048, 4, 2, 128)), 100)
    print(f"100 repeats are bit-identical: {same}", flush=True)
    rows: list[dict[str, Any]] = []
    cases = [Case(*one) for one in options.case or []] + [of_length(n) for n in options.lengths or []]
    for case in [] if options.only_checks else cases or CASES:
        rows += time_case(case)
        write_csv(options.out / "parallax.csv", rows)
    summary = {"errors": checked, "repeats": same, **environment()}
    (options.out / "parallax.json").write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
