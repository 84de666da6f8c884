"""`python benchmarks/fp8.py --out FOLDER`: FP8 attention over the gathered rows beside bf16's, one GPU.

By Transformer Engine, whose scales are of the step before (delayed scaling): what it is timed and measured on are inputs that
no scale has seen. First its errors against float64, forward and backward, of gathered rows' sizes and of sharper scores; then
the layer at 98,304 and 524,288 tokens, forward and with backward, and what attends alone, in bf16 by the fastest backend and by
Transformer Engine, and in FP8; then which kernels FP8 spends its time in. Leaves fp8.csv and fp8.json; ends within 90 seconds.

`--part train` instead trains a small model for 300 steps in bf16, with FP8 in the linear layers, and with FP8 attention too,
side by side, and compares the mean loss of the last 50.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attention_cases import Case
from attention_checks import QKV, each
from csv_tables import write_csv
from measure import median_ms
from torch import Tensor
from training_step import command, losses

from megatron_lighthouse import lighthouse_attention
from megatron_lighthouse.launch.torchrun import one_rank, torchrun
from megatron_lighthouse.lighthouse.attention import attended_rows
from megatron_lighthouse.softmax.backends import inner_attention
from megatron_lighthouse.variant import Place
from megatron_lighthouse.versions import environment

CASES = [Case(98304, 1536), Case(524288, 4096)]
BAR, TIMES = 47.0, 1.25
"""Milliseconds of the layer at 524,288 tokens with backward, and how many times bf16's speed that is to be."""
FP8 = "--fp8-format hybrid --fp8-recipe delayed --fp8-amax-history-len 16 --fp8-amax-compute-algo max".split()
TRAINED = {"bf16": [], "FP8 linear layers": FP8, "FP8 attention too": [*FP8, "--fp8-dot-product-attention"]}
FORMATS = {"bf16": "", "FP8": "HYBRID", "FP8, all E4M3": "E4M3"}
"""By what Transformer Engine calls them; HYBRID has gradients in E5M2, which keeps two bits of the mantissa and not three."""
NEAR = 0.01
"""Nats, between the means of bf16's last losses and of FP8's."""
LAST = 50

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Engine:
    """Transformer Engine's attention, [S, B, H, D] each, in a format of FP8 or, with none, as it is given."""

    def __init__(self, heads: int, groups: int, dim: int, fp8: str) -> None:
        import transformer_engine.pytorch as te
        from transformer_engine.common.recipe import DelayedScaling, Format

        named = {"num_gqa_groups": groups, "attention_dropout": 0.0, "attn_mask_type": "causal", "qkv_format": "sbhd"}
        self.module = te.DotProductAttention(heads, dim, **named)
        recipe = DelayedScaling(fp8_format=Format[fp8 or "HYBRID"], amax_history_len=16, amax_compute_algo="max", fp8_dpa=True)
        self.within = lambda: te.autocast(enabled=bool(fp8), recipe=recipe)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with self.within():
            out: Tensor = self.module(query, key, value)
        return out.unflatten(-1, (query.shape[2], -1))

    def next_scales(self) -> None:
        """Those of the backward pass: the first linear layer's backward would make them, and here is none."""
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager

        FP8GlobalStateManager.reduce_and_update_fp8_tensors(forward=False)


def relative(found: Tensor, expected: Tensor) -> float:
    return float(f"{((found.double() - expected).norm() / expected.norm()).item():.2e}")


def in_float64(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    ratio = query.shape[2] // key.shape[2]
    q, k, v = query.permute(1, 2, 0, 3), key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)
    k, v = (x.repeat_interleave(ratio, 1) for x in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    future = torch.ones(scores.shape[-2:], device=q.device, dtype=torch.bool).triu(1)
    return (scores.masked_fill(future, float("-inf")).softmax(-1) @ v).permute(2, 0, 1, 3)


def errors(rows: int, heads: int, groups: int, sharp: float) -> list[dict[str, object]]:
    """Of outputs and gradients, in norm, on inputs drawn anew after a few steps."""
    shapes = [(rows, 1, n, 128) for n in (heads, groups, groups)]

    def drawn() -> tuple[QKV, Tensor]:
        q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
        return (q * sharp, k, v), torch.randn(shapes[0], device="cuda", dtype=torch.bfloat16)

    engines = {name: Engine(heads, groups, 128, fp8) for name, fp8 in FORMATS.items()}
    for _ in range(4):
        inputs, grad = drawn()
        for engine in engines.values():
            with_gradients(engine, each(inputs, lambda x: x.detach().requires_grad_()), grad)
            engine.next_scales()
    inputs, grad = drawn()
    exact = each(inputs, lambda x: x.double().requires_grad_())
    out = in_float64(*exact)
    expected = [out, *torch.autograd.grad(out, exact, grad.double())]
    found = []
    for name, engine in engines.items():
        leaves = each(inputs, lambda x: x.detach().requires_grad_())
        out = engine(*leaves)
        got = [out, *torch.autograd.grad(out, leaves, grad)]
        row = {what: relative(x, y) for what, x, y in zip(("out", "dq", "dk", "dv"), got, expected, strict=True)}
        found.append({"rows": rows, "heads": heads, "groups": groups, "scores": sharp, "in": name, **row})
        print(found[-1], flush=True)
    return found


def timed(case: Case) -> list[dict[str, object]]:
    """Milliseconds, of the layer and of what attends in it."""
    sets = [case.inputs() for _ in range(2)]
    fast = inner_attention("auto", *sets[0][:2])
    bf16, fp8 = (Engine(case.heads, case.groups, case.dim, kind) for kind in ("", "HYBRID"))
    ways: dict[str, Attend] = {"bf16": fast, "bf16, Transformer Engine": bf16, "FP8": fp8}
    rows = [rows_of(case, one) for one in sets]
    found = []
    for name, attend in ways.items():
        layers: list[tuple[str, Attend, list[QKV]]] = [("layer", layer_of(case, attend), sets), ("inner", attend, rows)]
        for what, function, given in layers:
            grad = torch.randn_like(function(*given[0]))
            settle(fp8, function, given, grad)
            forward = median_ms([partial(function, *x) for x in given], 0.2)
            both = median_ms([partial(with_gradients, function, x, grad) for x in given], 0.3)
            ms = {"fwd ms": round(forward, 3), "fwd+bwd ms": round(both, 3)}
            found.append({"N": case.seq_length, "what": what, "in": name, **ms})
            print(found[-1], flush=True)
    return found


def with_gradients(function: Attend, inputs: QKV, grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(function(*inputs), inputs, grad)


def layer_of(case: Case, attend: Attend) -> Attend:
    return lambda q, k, v: lighthouse_attention(q, k, v, case.config, attend=attend)


def rows_of(case: Case, inputs: QKV) -> QKV:
    """What the layer gathers of them."""
    kept: list[Tensor] = []

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        kept[:] = [x.detach().requires_grad_() for x in (query, key, value)]
        return query

    with torch.no_grad():
        attended_rows(*inputs, case.config, Place(base_attends=True), attend=attend)
    return kept[0], kept[1], kept[2]


def settle(engine: Engine, function: Attend, given: list[QKV], grad: Tensor) -> None:
    for inputs in given:
        with_gradients(function, inputs, grad)
        engine.next_scales()


def kernels_of(case: Case) -> dict[str, float]:
    """Milliseconds by kernel, of FP8 attention over the rows, forward and backward: what is cuDNN's, and what is cast."""
    engine, rows = Engine(case.heads, case.groups, case.dim, "HYBRID"), rows_of(case, case.inputs())
    grad = torch.randn_like(engine(*rows))
    settle(engine, engine, [rows, rows], grad)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        with_gradients(engine, rows, grad)
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.device_time_total)
    return {event.key[:70]: round(event.device_time_total / 1000, 3) for event in events[:12]}


def verdict(rows: list[dict[str, Any]]) -> dict[str, object]:
    """The layer at the longest length against its bar."""
    layers = {row["in"]: row["fwd+bwd ms"] for row in rows if (row["N"], row["what"]) == (CASES[-1].seq_length, "layer")}
    times = round(layers["bf16"] / layers["FP8"], 3)
    return {"ms": layers["FP8"], "times bf16": times, "held": layers["FP8"] <= BAR and times >= TIMES}


def train(options: argparse.Namespace, more: list[str]) -> dict[str, object]:
    """Each of TRAINED, side by side, and what FP8 costs in loss: up to the last step that all have done."""
    runs = {name: started(name, flags, options, more) for name, flags in TRAINED.items()}
    last = time.monotonic() + options.within
    for process, log in runs.values():
        try:
            status = process.wait(max(0.0, last - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            continue
        if status:
            print(log.read_text(errors="replace")[-3000:], flush=True)
    each = {name: losses(log.read_text(errors="replace")) for name, (_, log) in runs.items()}
    steps = min(map(len, each.values()))
    if steps < LAST:
        return {"steps": {name: len(of) for name, of in each.items()}, "held": False}
    means = {name: statistics.mean(of[steps - LAST : steps]) for name, of in each.items()}
    above = {name: round(mean - means["bf16"], 4) for name, mean in means.items()}
    held = steps == options.steps and all(abs(gap) <= NEAR for gap in above.values())
    return {"steps": steps, "mean of the last 50": means, "above bf16": above, "nats allowed": NEAR, "held": held}


def started(name: str, flags: list[str], options: argparse.Namespace, more: list[str]) -> tuple[subprocess.Popen[bytes], Path]:
    """A run in a process of its own, and its log."""
    own = argparse.Namespace(**{**vars(options), "out": options.out / name.replace(" ", "-")})
    own.out.mkdir(parents=True, exist_ok=True)
    dense = ["--lighthouse-dense-first", "1", "--lighthouse-dense-last", "1"]
    words = command(["--attention", "lighthouse", *dense, *flags], own, more)[len(torchrun(1)) :]
    log = own.out / "log.txt"
    with log.open("w") as file:
        return subprocess.Popen([sys.executable, *words], stdout=file, stderr=subprocess.STDOUT, env=one_rank()), log


def keep(to: Path, found: dict[str, object]) -> None:
    to.write_text(json.dumps({**environment(), **found}, indent=2) + "\n")
    print(json.dumps(found, indent=2), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("fp8"))
    parser.add_argument("--part", choices=["layer", "train"], default="layer")
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--seq-length", type=int, default=8192, help="of training")
    parser.add_argument("--layers", type=int, default=6, help="of the model that is trained")
    parser.add_argument("--budget", type=int, default=128, help="of training")
    parser.add_argument("--within", type=float, default=540, help="seconds that training may take")
    options, more = parser.parse_known_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part == "train":
        options.ranks = 1
        keep(options.out / "train.json", train(options, more))
        return
    os.environ.setdefault("NVTE_FLASH_ATTN", "0")  # else a bf16 call may take FlashAttention
    begun = time.monotonic()
    checked = [row for sharp in (1.0, 4.0) for row in errors(4096, 4, 4, sharp)] + errors(4000, 4, 2, 1.0)
    rows = [row for case in CASES for row in timed(case)]
    write_csv(options.out / "fp8.csv", rows)
    found = {"errors": checked, "524,288 tokens": verdict(rows), "kernels": kernels_of(CASES[-1])}
    keep(options.out / "fp8.json", {**found, "seconds": round(time.monotonic() - begun)})


if __name__ == "__main__":
    main()
