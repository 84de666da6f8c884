"""`python benchmarks/attention.py --out FOLDER`: checks, times and plots one attention layer on one GPU.

Dense (cuDNN, FlashAttention), Lighthouse, Lighthouse by step, the inner attention alone and the memory floor, over sequence
length and over (L, p, k), forward and forward + backward, with peak memory and the bytes kept for backward. `--reference
PATH` also times the authors' public code from a checkout of yours, in the same run, and `--against CHECKOUT` another build of
this project. Leaves a CSV, a JSON summary and two pictures; `--part` runs a part. Times are medians of CUDA events; inputs are
random, bf16, and rotate so that no cache holds them. All of it takes about seven minutes on an H100.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import another_build
import torch
from attention_cases import LENGTHS, OTHERS, SHAPES, Case
from attention_checks import QKV, check, each
from attention_plots import draw
from competitors import authors, available, dense
from csv_tables import write_csv
from measure import copy_gb_per_second, host_ms, median_ms, peak_gib
from torch import Tensor

from megatron_lighthouse import lighthouse_attention
from megatron_lighthouse.kernels import lighthouse as kernels
from megatron_lighthouse.kernels.lighthouse.gather import NOT_TURNED, _gather_backward
from megatron_lighthouse.kernels.lighthouse.scatter import _scatter_backward
from megatron_lighthouse.softmax.backends import inner_attention
from megatron_lighthouse.versions import environment

Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


REFERENCE = [case for case in [*LENGTHS, OTHERS[-1]] if case.seq_length in (98304, 262144, 491520, 524288)]
"""Where the authors' code is timed: each of these compiles for a quarter of a minute."""


PARTS = {"targets": [Case(98304, 1536), Case(524288, 4096)], "lengths": LENGTHS, "variants": OTHERS, "shapes": SHAPES}


class Table:
    """Rows of the result, printed as they come."""

    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []

    def add(self, case: Case, what: str, direction: str, ms: float | None, **more: object) -> None:
        row = {"case": case.name, "N": case.seq_length, "what": what, "direction": direction, "ms": ms, **more}
        self.rows.append(row)
        print(f"{case.name:34} {what:16} {direction:9} {'fails' if ms is None else f'{ms:10.3f} ms'} {more or ''}", flush=True)

    def ms(self, case: Case, what: str, direction: str) -> float | None:
        found = [r["ms"] for r in self.rows if (r["case"], r["what"], r["direction"]) == (case.name, what, direction)]
        return found[0] if found else None  # type: ignore[return-value]


def forward(layer: Layer, inputs: QKV) -> Callable[[], object]:
    return lambda: layer(*inputs)


def both(layer: Layer, inputs: QKV, grad: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(layer(*inputs), inputs, grad)


def time_layer(table: Table, case: Case, what: str, layer: Layer, sets: list[QKV], seconds: float) -> None:
    """Forward and forward + backward of `layer`, and what it needs at its peak."""
    try:
        grads = [torch.randn_like(layer(*inputs)) for inputs in sets[:1]]
        peak = peak_gib(both(layer, sets[0], grads[0]))
        table.add(case, what, "fwd", median_ms([forward(layer, x) for x in sets], seconds), peak_gib=round(peak, 3))
        calls = [both(layer, x, grads[0]) for x in sets]
        extra = {"eager_ms": round(host_ms(calls[0]), 3)} if case.seq_length <= 32768 else {}
        table.add(case, what, "fwd+bwd", median_ms(calls, seconds), **extra)
    except Exception as error:  # a competitor that cannot run is a result
        print(f"{what}: {type(error).__name__}: {str(error)[:300]}")
        table.add(case, what, "fwd", None)
        table.add(case, what, "fwd+bwd", None)
    gc.collect()
    torch.cuda.empty_cache()


def time_steps(table: Table, case: Case, sets: list[QKV], rate: float) -> None:
    """Each step alone, against the bytes it must move at `rate` gigabytes per second."""
    geometry = case.config.geometry(case.seq_length)
    plain = [each(inputs, torch.Tensor.detach) for inputs in sets]
    n, s = case.seq_length, geometry.gathered_length
    row = case.batch * case.dim * 2
    heads, all_heads = case.heads, case.heads + 2 * case.groups
    scores = [kernels.score(q, k, geometry) for q, k, _ in plain]
    selections = [kernels.select(x, geometry, True) for x in scores]
    rows = [kernels.gather(*x, y) for x, y in zip(plain, selections, strict=True)]
    grads = [torch.randn_like(q) for q, _, _ in plain]
    maps = [(y.places, y.sizes) for y in selections]
    # what a step does on the inputs of set i, and the bytes that it must move
    steps: dict[tuple[str, str], tuple[Callable[[int], object], int]] = {
        ("score", "fwd"): (lambda i: kernels.score(plain[i][0], plain[i][1], geometry), n * (heads + case.groups) * row),
        ("select", "fwd"): (lambda i: kernels.select(scores[i], geometry, True), 0),
        ("gather", "fwd"): (lambda i: kernels.gather(*plain[i], selections[i]), (n + s) * all_heads * row),
        ("scatter", "fwd"): (lambda i: kernels.scatter(rows[i][0], selections[i]), (n + s) * heads * row),
        ("scatter", "bwd"): (lambda i: _scatter_backward(grads[i], *maps[i], False), (n + s) * heads * row),
        ("gather", "bwd"): (lambda i: _gather_backward(*rows[i], *maps[i], None, NOT_TURNED), (n + s) * all_heads * row),
    }
    totals: dict[str, list[float]] = {"fwd": [0.0, 0.0], "bwd": [0.0, 0.0]}
    for (name, direction), (work, moved) in steps.items():
        ms, floor = median_ms([partial(work, i) for i in range(len(plain))]), moved / rate / 1e6
        table.add(case, name, direction, ms, floor_ms=round(floor, 4))
        totals[direction][0] += ms
        totals[direction][1] += floor
    for direction, (ms, floor) in totals.items():
        table.add(case, "all steps", direction, ms, floor_ms=round(floor, 4), ratio=round(ms / floor, 3))
    leaves = [each(y, lambda x: x.detach().requires_grad_()) for y in rows]
    layer = inner_attention("auto", rows[0][0], rows[0][1])
    grad = torch.randn_like(rows[0][0])
    table.add(case, "inner", "fwd", median_ms([forward(layer, x) for x in leaves]))
    table.add(case, "inner", "fwd+bwd", median_ms([both(layer, x, grad) for x in leaves]))


def kept_bytes(layer: Layer, inputs: QKV) -> int:
    """Bytes that the layer keeps for backward, each storage counted once, its output not."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = layer(*inputs)
    kept.pop(out.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def run_case(
    table: Table, case: Case, reference: Path | None, against: Path | None, rate: float, dense_seconds: float, backends: bool
) -> None:
    one = case.inputs()
    count = max(1, min(3, -(-(200 << 20) // sum(x.nbytes for x in one))))
    sets = [one, *(case.inputs() for _ in range(count - 1))]
    config = case.config

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return lighthouse_attention(q, k, v, config)

    time_layer(table, case, "lighthouse", ours, sets, 0.4)
    for direction, ms in another_build.times(case, against).items() if against else ():
        table.add(case, "other build", direction, ms)
    time_steps(table, case, sets, rate)
    # dense attention over a million tokens would take 15 s a step
    names = available(*one[:2]) if backends else ["cudnn"] if case.seq_length <= 524288 else []
    for name in names:
        layer = dense(name, *one[:2])
        if layer is not None:
            time_layer(table, case, f"dense {name}", layer, sets, dense_seconds)
    if reference is not None and case in REFERENCE:
        theirs = authors(reference, case.levels, case.pooling, case.budget)
        time_layer(table, case, "authors", lambda q, k, v: theirs(*(x.transpose(0, 1) for x in (q, k, v))), sets, 0.4)
    if case.seq_length == 98304:
        alone = each(one, lambda x: x.detach().contiguous().requires_grad_())  # v as a view would count what it is a view of
        mine, full = kept_bytes(ours, alone), kept_bytes(dense("cudnn", *one[:2]), alone)  # type: ignore[arg-type]
        table.add(case, "kept bytes", "fwd", 0.0, lighthouse=mine, dense=full, ratio=round(mine / full, 4))
    del sets, one
    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "attention")
    parser.add_argument("--reference", type=Path, help="a checkout of the authors' repository; needs the package einops")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="time another build too")
    parser.add_argument("--part", choices=list(PARTS), nargs="+", default=["lengths", "variants", "shapes"])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    table, rate = Table(), copy_gb_per_second()
    print(f"{environment()}\ncopy {rate:.0f} GB/s", flush=True)
    checks = check()
    for case in (case for part in options.part for case in PARTS[part]):
        # dense attention over half a million tokens takes seconds: once is enough
        seconds = 0.4 if case.seq_length <= 131072 else 0.1
        run_case(table, case, options.reference, options.against, rate, seconds, case.seq_length <= 98304)
        write(options.out, "-".join(options.part), table, rate, checks)
    draw(options.out, table.rows)


def write(out: Path, part: str, table: Table, rate: float, checks: dict[str, object]) -> None:
    write_csv(out / f"{part}.csv", table.rows)
    summary = {**environment(), "copy GB/s": round(rate), "checks": checks, "targets": targets(table)}
    (out / f"{part}.json").write_text(json.dumps(summary, indent=2) + "\n")


def targets(table: Table) -> list[dict[str, object]]:
    """The figures that README and docs quote."""
    found: list[dict[str, object]] = []
    for case in dict.fromkeys(case for case in [*LENGTHS, *OTHERS, *SHAPES]):
        for direction in ("fwd", "fwd+bwd"):
            ours = table.ms(case, "lighthouse", direction)
            if ours is None:
                continue
            row: dict[str, object] = {"case": case.name, "direction": direction, "lighthouse ms": round(ours, 3)}
            for what in ("dense cudnn", "authors", "inner"):
                other = table.ms(case, what, direction)
                row[f"{what} ms"] = None if other is None else round(other, 3)
                if other is not None:
                    row[f"times {what}"] = round(other / ours, 2)
            found.append(row)
    return found


if __name__ == "__main__":
    main()
