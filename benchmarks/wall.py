"""`python benchmarks/wall.py --out FOLDER`: one layer of Wall on one GPU, beside dense attention and others' kernels.

Ours, flash-linear-attention's where it is installed, and cuDNN's dense attention, in the same run: forward and forward with
backward, bf16, at the gates of a bias of 8, and the first call of ours. Before that the errors of ours against float64 over a
short sequence, cut into pieces, at initial gates and at -2 (the bars: gradients of gates within 3 % and 6 %), and whether
repeats give the same bits. Beside times stands their floor: products at the GPU's peak, and what the kernels must move. Leaves
wall.csv and wall.json.

At 98,304 tokens Lighthouse around Wall too, k = 1536, and around softmax.

The bars on one H200: 32,768 tokens forward 6 ms, with backward 27 ms; 98,304 with backward 210 ms, with Lighthouse around 9 ms.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from csv_tables import write_csv
from measure import median_ms
from one_layer import AROUND_FROM, CASES, COPIES, Case, Layer, around, of_length, repeats, timed
from torch import Tensor

from megatron_lighthouse import lighthouse_attention
from megatron_lighthouse.softmax.backends import inner_attention
from megatron_lighthouse.versions import environment
from megatron_lighthouse.wall.attention import wall_attention
from megatron_lighthouse.wall.cut import Step, rows_of_halves
from megatron_lighthouse.wall.layer import build

INITIAL = -3.35e-4
"""The gates of a bias of 8."""
OPERATIONS, BYTES = 989e12, 4.8e12
"""A second, of an H200 in bf16 by its data sheet."""
PRODUCTS = {"fwd": (2, 2), "fwd+bwd": (7, 9)}
"""For a pair of tokens in different pieces, and in one: there tiles of queries and tiles of keys both make logits."""
MOVED = {"fwd": 22, "fwd+bwd": 104}
"""Bytes for each channel of a query that kernels move along the diagonal, keys and values, which a group shares, left out."""
NAMES = ("out", "dq", "dk", "dv", "dg", "dγ")
AROUND = around("wall")
HALF = 64
SCALAR = -0.05
"""Scalar gates, where they are checked."""


class Checked(NamedTuple):
    """What is held to float64."""

    heads: int
    groups: int
    dim: int
    value_dim: int
    dtype: str
    scalar: bool = False


CHECKED = [
    *(Checked(4, 2, dim, dim, "bfloat16") for dim in (128, 64, 80, 96, 32, 48, 256)),
    *(Checked(4, 4, dim, dim, "bfloat16") for dim in (128, 64)),
    *(Checked(4, 2, *dims, "bfloat16") for dims in ((128, 64), (64, 128))),
    *(Checked(4, 2, dim, dim, "float32") for dim in (128, 64)),
    *(Checked(4, 2, *dims, "bfloat16", scalar=True) for dims in ((128, 128), (64, 64), (128, 64))),
]


def inputs_of(case: Case, gate: float = INITIAL, device: str = "cuda") -> list[Tensor]:
    """q, k and v in bf16 and g in fp32, spread about its mean, with gradients: [N, 1, ·, D]."""
    query, key, value, gates = (
        torch.randn(case.tokens, 1, n, case.dim, device=device) for n in (case.heads, case.groups, case.groups, case.heads)
    )
    rows = [x.to(torch.bfloat16).requires_grad_() for x in (query, key, value)]
    return [*rows, (gate * (1 + 0.5 * gates.tanh())).requires_grad_()]


def layers(inputs: list[Tensor], options: bool = False) -> dict[str, Layer]:
    """What can run here, by name; with `options` ours alone: as it is, with scalar gates, and with keys half as wide."""
    if options:
        return {
            "ours": wall_attention,
            "scalar gates": lambda q, k, v, g: wall_attention(q, k, v, g, scalar_gate=g[..., 0]),
            "narrow keys": lambda q, k, v, g: wall_attention(q[..., :HALF], k[..., :HALF], v, g[..., :HALF]),
        }
    dense = inner_attention("cudnn", inputs[0], inputs[1])
    found: dict[str, Layer] = {"ours": wall_attention, "dense": lambda q, k, v, g: dense(q, k, v)}
    if len(inputs[0]) >= AROUND_FROM:
        found["around"] = lambda q, k, v, g: lighthouse_attention(q, k, v, AROUND, streams=[g])
        found["lighthouse"] = lambda q, k, v, g: lighthouse_attention(q, k, v, AROUND.replace(around="softmax"))
    try:
        parallel_wall = import_module("fla.ops.wall_attn").parallel_wall_attn
        one_tile_shape(import_module("fla.ops.wall_attn.parallel"))
    except (ImportError, AttributeError) as error:
        print(f"fla is left out: {error}")
        return found

    def fla(*rows: Tensor) -> Tensor:
        out = parallel_wall(*(x.transpose(0, 1) for x in rows))
        return (out[0] if isinstance(out, tuple) else out).transpose(0, 1)

    return {**found, "fla": fla}


def one_tile_shape(module: Any) -> None:
    """Have every kernel of a module take one of the shapes that it would try, of 4 warps: trying all takes many minutes."""
    for kernel in vars(module).values():
        if hasattr(kernel, "configs") and hasattr(kernel, "prune_configs"):
            kernel.configs = [x for x in kernel.configs if x.num_warps == 4][:1] or kernel.configs[:1]


def floor_ms(case: Case, direction: str) -> float:
    """Milliseconds that ours cannot be below: products, then bytes. Of each size of halves queries and keys are written."""
    piece = min(Step.along(alike=True), case.tokens)
    same = case.tokens * piece / 2
    apart = case.tokens**2 / 2 - same
    products = sum(n * pairs for n, pairs in zip(PRODUCTS[direction], (apart, same), strict=True)) * case.heads * case.dim
    decayed = 4 * sum(rows_of_halves(case.tokens, piece)) * (1 if direction == "fwd" else 3)
    moved = (case.tokens * MOVED[direction] + decayed) * case.heads * case.dim
    return 1000 * (2 * products / OPERATIONS + moved / BYTES)


def parts(case: Case) -> list[dict[str, Any]]:
    """Milliseconds of each kernel in a forward and backward pass of Lighthouse around Wall, the longest first."""
    inputs = inputs_of(case)
    layer = layers(inputs)["around"]
    grad = torch.randn_like(inputs[0])
    for _ in range(2):
        torch.autograd.grad(layer(*inputs), inputs, grad)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.autograd.grad(layer(*inputs), inputs, grad)
        torch.cuda.synchronize()
    found = [(x.device_time_total / 1000, x.count, x.key) for x in profile.key_averages() if x.device_time_total]
    whole = median_ms([lambda: torch.autograd.grad(layer(*inputs), inputs, grad)])
    found.append((whole, 1, "all of it, and what the host lets wait"))
    return [{"ms": round(ms, 4), "launches": count, "kernel": name[:100]} for ms, count, name in sorted(found, reverse=True)]


def time_case(case: Case, options: bool = False) -> list[dict[str, Any]]:
    """Milliseconds of each of `layers`."""
    sets = [inputs_of(case) for _ in range(COPIES)]
    rows = []
    for name, layer in layers(sets[0], options).items():
        found = timed(name, layer, sets)
        for direction, ms in found.ms.items():
            row = {**case._asdict(), "what": name, "direction": direction, "ms": round(ms, 3)}
            floor = round(floor_ms(case, direction), 3) if name == "ours" else None
            rows.append({**row, "first_s": round(found.first_s, 2), "floor_ms": floor, "peak_gib": round(found.peak_gib, 3)})
            print(rows[-1], flush=True)
    return rows


def errors(checked: Checked, gate: float, tokens: int, device: str) -> dict[str, float]:
    """Of output and gradients, relative to their norms, against ours in float64."""
    inputs = checked_inputs(checked, gate, tokens, device)
    query, key, value, gates, *scalar = inputs
    kernels = "triton" if device == "cuda" else "reference"
    attend = build(query, key, value, query.shape[2], kernels=kernels, biased=checked.scalar)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact = wall_attention(*wide[:4], scalar_gate=wide[4] if scalar else None)
    out = attend(query, key, value, gates, scalar[0].unsqueeze(-1) if scalar else None, None)
    grad = torch.randn_like(out)
    expected = [exact, *torch.autograd.grad(exact, wide, grad.double())]
    grads = torch.autograd.grad(out, inputs, grad)
    compared = zip(NAMES, (out, *grads), expected, strict=False)
    return {name: round(float((a.double() - b).norm() / b.norm()), 6) for name, a, b in compared}


def checked_inputs(checked: Checked, gate: float, tokens: int, device: str) -> list[Tensor]:
    """As `inputs_of`, and scalar gates in fp32 where asked for."""
    heads, groups, dim, value_dim, dtype, scalar = checked
    sizes = ((heads, dim), (groups, dim), (groups, value_dim), (heads, dim))
    *rows, gates = (torch.randn(tokens, 1, *size, device=device) for size in sizes)
    rows = [x.to(getattr(torch, dtype)).requires_grad_() for x in rows]
    of_heads = SCALAR * torch.rand(tokens, 1, heads, device=device)
    found = [gate * (1 + 0.5 * gates.tanh()), *([of_heads] if scalar else [])]
    return [*rows, *(x.requires_grad_() for x in found)]


def check(number: int, out: Path, tokens: int, device: str) -> None:
    """One of CHECKED, to a file of its own."""
    torch.manual_seed(1)
    Step.TOKENS = tokens
    found = {f"g {gate}": errors(CHECKED[number], gate, tokens, device) for gate in (INITIAL, -0.1, -2.0)}
    (out / f"check-{number}.json").write_text(json.dumps(found))


def check_all(out: Path, tokens: int, device: str) -> dict[str, Any]:
    """Each of CHECKED in a process of its own, all at once: what ends one leaves the others."""
    running = []
    for i, checked in enumerate(CHECKED):
        command = [sys.executable, __file__, "--out", str(out), "--check", str(i)]
        running.append((i, checked, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)))
    found: dict[str, Any] = {}
    for i, checked, process in running:
        try:
            said, _ = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            process.kill()
            said = "took more than 300 s"
        path = out / f"check-{i}.json"
        name = f"H={checked.heads} G={checked.groups} K={checked.dim} V={checked.value_dim} {checked.dtype}"
        name += " scalar" if checked.scalar else ""
        errors = [line for line in said.splitlines() if "rror" in line or "took" in line]
        found[name] = json.loads(path.read_text()) if path.exists() else "FAILED: " + "; ".join(errors[-2:])[:300]
        path.unlink(missing_ok=True)
        print(name, json.dumps(found[name]), flush=True)
    return found


def repeats_deterministically(case: Case, times: int, device: str) -> bool:
    """`repeats`, where torch is asked for it: attention to earlier pieces is a stock kernel's."""
    torch.use_deterministic_algorithms(True)
    same = repeats(wall_attention, inputs_of(case, device=device), times)
    torch.use_deterministic_algorithms(False)
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "wall")
    parser.add_argument("--lengths", type=int, nargs="+", help="instead of the cases' own: of 8 heads of 128")
    parser.add_argument(
        "--piece",
        type=int,
        default=Step.TOKENS,
        help="tokens of a piece that travels; along the diagonal a quarter; default: %(default)s",
    )
    parser.add_argument("--only-times", action="store_true", help="no checks")
    parser.add_argument("--options", action="store_true", help="time ours alone, with scalar gates and with narrow keys too")
    parser.add_argument("--only-check", action="store_true", help="errors and repeats alone, on a CPU too")
    parser.add_argument("--parts", action="store_true", help="the kernels of Lighthouse around Wall alone, and their times")
    parser.add_argument("--check", type=int, help="one of the shapes that are checked, alone: each has a process of its own")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(1)
    gpu = torch.cuda.is_available()
    device, tokens = ("cuda", 1024) if gpu else ("cpu", 128)
    if options.parts:
        Step.TOKENS = options.piece
        print(f"pieces of {options.piece}", *parts(of_length(AROUND_FROM)), sep="\n", flush=True)
        return None
    if options.check is not None:
        return check(options.check, options.out, tokens, device)
    checked = {} if options.only_times else check_all(options.out, tokens, device)
    Step.TOKENS = tokens
    dim, times = (128, 100) if gpu else (16, 2)
    same = None if options.only_times else repeats_deterministically(Case(tokens, 4, 2, dim), times, device)
    Step.TOKENS = options.piece
    print(f"repeats are bit-identical: {same}", flush=True)
    rows: list[dict[str, Any]] = []
    cases = [of_length(n) for n in options.lengths] if options.lengths else CASES
    for case in () if options.only_check else cases:
        rows += time_case(case, options.options)
        write_csv(options.out / ("options.csv" if options.options else "wall.csv"), rows)
    if options.options:
        return
    summary = {"errors": checked, "repeats": same, **environment()}
    (options.out / "wall.json").write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
