"""`python benchmarks/rings.py --out FOLDER`: packed documents, Parallax and Wall over the GPUs of one machine, beside dense.

One process a GPU, over NCCL, bf16, 8 heads of 128. Of each case first the equality: output and gradients of all ranks against
those of one, error by norm, and the greatest of any element beside the greatest element. Then the bytes that a rank sent beside
those of the plan, whether three repeats give the same bits (the copies and our kernels do, cuDNN's backward does not), and the
times on one rank and on all: efficiency is one rank's over as many times that of all; and what a call takes the host from an
idle GPU on. Documents stand beside one document of their row. Leaves rings.csv and rings.json, as far as it came, after every
case. One that fails is written down, and the others go on in new processes; the status is 1 then. `--inner fa4 cudnn` takes
these backends for Lighthouse and dense attention in turn.

`--warm` runs every case once and times nothing: several of them side by side, each with its `--cases`, fill Triton's cache.
`--device cpu` goes the whole way over gloo at a 128th of the length, and times nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from context_parallel import one_cudnn
from context_parallel_layers import both
from context_parallel_times import times_of
from csv_tables import write_csv
from documents import drawn
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from megatron_lighthouse import LighthouseConfig, lighthouse_attention
from megatron_lighthouse.context_parallel import exchange as exchange_module
from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.lighthouse.geometry import Shape
from megatron_lighthouse.lighthouse.packed.packing import Packing
from megatron_lighthouse.lighthouse.packed.sent import document_bytes
from megatron_lighthouse.parallax.attention import parallax_attention
from megatron_lighthouse.sequence.documents import Documents
from megatron_lighthouse.sequence.layout import Layout
from megatron_lighthouse.softmax.backends import inner_attention
from megatron_lighthouse.softmax.names import OVER_SHARDS
from megatron_lighthouse.softmax.sharded import sharded_attention
from megatron_lighthouse.variants import VARIANTS
from megatron_lighthouse.versions import environment
from megatron_lighthouse.wall.attention import wall_attention

HEADS, DIM = 8, 128
LENGTHS = (32768, 98304, 262144, 524288)
BY_DEFAULT = LENGTHS[:2]
PATIENCE = timedelta(seconds=60)
"""With a rank that does not come to a collective: the first call of a case compiles its kernels."""
SHORTER = 128
"""How much shorter rows are on a CPU."""
MEANS = {"documents, mean 8K": 8192, "documents, mean 32K": 32768}
BACKED = ("dense", "lighthouse")
"""Those that --inner speaks of."""
GATE = -3.35e-4
"""Gates of Wall, those of a bias of 8."""
REPEATS = 3
Layer = Callable[..., Tensor]
Group = dist.ProcessGroup | None


@dataclass(frozen=True)
class Case:
    """A layer over rows of one length."""

    what: str
    """dense, lighthouse, parallax, wall, or a name of MEANS."""
    tokens: int
    inner: str = "auto"
    """The backend of Lighthouse's inner attention and of dense attention."""

    @property
    def name(self) -> str:
        return f"{self.what}, {self.tokens}" + (f", {self.inner}" if self.inner != "auto" else "")

    @property
    def config(self) -> LighthouseConfig:
        """Of Lighthouse: L = 3, p = 4, k = N/64 or, of long rows, N/128, with tiles that no rank has to deal out."""
        budget = max(8, self.tokens // (64 if self.tokens <= 131072 else 128))
        return LighthouseConfig(3, 4, budget, tile_budget=max(4, budget // 16), inner=self.inner)

    def documents(self, device: str) -> Documents | None:
        """As they fill a row, from one drawing of a log-normal."""
        if self.what not in MEANS:
            return None
        mean = max(4, MEANS[self.what] * self.tokens // 98304)
        bounds = torch.tensor([0, *drawn(mean, self.tokens, self.tokens)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return Documents.of(bounds.to(device), self.tokens)

    def inputs(self, device: str) -> list[Tensor]:
        """Queries, keys, values, what else it reads, and the gradient of the output, the same on every rank."""
        torch.manual_seed(1)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        query, key, value, other, grad = torch.randn(5, self.tokens, 1, HEADS, DIM, device=device).unbind()
        more = {"parallax": [(0.3 * other).to(dtype)], "wall": [GATE * (1 + 0.5 * other.tanh())]}.get(self.what, [])
        return [*(x.to(dtype) for x in (query, key, value)), *more, grad.to(dtype)]

    def layer(self, group: Group, inputs: Sequence[Tensor], documents: Documents | None) -> Layer:
        """Over one rank's rows of all, or over all of them where there is no group."""
        if self.what == "parallax":
            return lambda q, k, v, r: parallax_attention(q, r, k, v, cp_group=group)
        if self.what == "wall":
            return partial(wall_attention, cp_group=group)
        if self.what == "dense":
            exchange, alike = Exchange.over(group), (self.inner, inputs[0], inputs[1])
            return sharded_attention(*alike, exchange, "p2p") if exchange else inner_attention(*alike)
        return partial(lighthouse_attention, config=self.config, cu_seqlens=documents, cp_group=group)

    def planned(self, layout: Layout, documents: Documents | None, itemsize: int) -> dict[str, tuple[int, int]]:
        """Bytes that a rank sends forward and backward, by purpose."""
        shape = Shape(1, HEADS, HEADS, DIM, itemsize)
        if documents is not None:
            return document_bytes("p2p", Packing.of(documents, self.config.rule), shape, layout)
        variant = VARIANTS[self.what]
        config = self.config if variant.selects else variant.config and variant.config()
        return variant.sent(config, self.tokens, shape, layout, "p2p")


CASES = [
    *(Case(what, n) for what in ("parallax", "wall", "dense", "lighthouse") for n in LENGTHS),
    *(Case(what, n) for what in MEANS for n in LENGTHS),
]


def whole(x: Tensor, rows: Tensor, exchange: Exchange) -> Tensor:
    """The rows of all ranks, each where it belongs."""
    parts = [torch.empty_like(x) for _ in range(exchange.size)]
    dist.all_gather(parts, x.contiguous(), group=exchange.group)
    places = [torch.empty_like(rows) for _ in range(exchange.size)]
    dist.all_gather(places, rows, group=exchange.group)
    return torch.cat(parts)[torch.cat(places).argsort()]


def measure(case: Case, exchange: Exchange, device: str, warm: bool) -> dict[str, Any]:
    """A row of the table."""
    inputs, documents, layout = case.inputs(device), case.documents(device), exchange.layout
    rows = documents.rows_of_rank(layout) if documents else exchange.own(torch.arange(case.tokens, device=device))
    shards = [x[rows] for x in inputs]
    alone = case.layer(None, inputs, documents)
    together = case.layer(exchange.group, shards, documents)
    expected = both(alone, inputs)
    exchange_module.sent.clear()
    parts = both(together, shards)
    sent = dict(exchange_module.sent)
    if warm:
        return {}
    found = [whole(x, rows, exchange) for x in parts]
    names = ["out", "dq", "dk", "dv", *(["d of the stream"] if len(found) > 4 else [])]
    errors = [distance(a, b) for a, b in zip(found, expected, strict=True)]
    row: dict[str, Any] = {"what": case.what, "tokens": case.tokens, "inner": case.inner, "ranks": exchange.size}
    row["documents"] = len(documents.lengths) if documents else 1
    row |= {f"error of {name}": f"{error:.2e}" for name, (error, _) in zip(names, errors, strict=True)}
    row["greatest, of the greatest element"] = f"{max(greatest for _, greatest in errors):.2e}"
    row["repeats to the bit"] = repeats(together, shards, exchange)
    counted, planned = sum(sent.values()), sum(map(sum, case.planned(layout, documents, inputs[0].element_size()).values()))
    row["sent MB"], row["planned MB"] = round(max(gathered(counted, exchange)) / 1e6, 3), max(gathered(planned, exchange)) / 1e6
    if device == "cuda":
        one, many = times_of(alone, inputs), times_of(together, shards)
        row |= {f"{name}, one rank": x for name, x in one.items()} | {f"{name}, all": x for name, x in many.items()}
        row["host ms"] = max(gathered(host_ms(partial(both, together, shards)), exchange))
        row["efficiency"] = round(one["fwd+bwd_ms"] / many["fwd+bwd_ms"] / exchange.size, 4)
    torch.use_deterministic_algorithms(True)
    try:
        row["where torch is asked for it"] = repeats(together, shards, exchange)
    except (ValueError, RuntimeError) as error:  # a backend that cannot, on every rank alike
        row["where torch is asked for it"] = str(error)[:200]
    torch.use_deterministic_algorithms(False)
    return row


def distance(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """By norm, and the greatest of any element beside the greatest element."""
    wide, exact = found.double(), expected.double()
    return float((wide - exact).norm() / exact.norm()), float((wide - exact).abs().max() / exact.abs().max())


def repeats(layer: Layer, shards: Sequence[Tensor], exchange: Exchange) -> bool:
    """Whether the same calls give the same bits on every rank."""
    first = both(layer, shards)
    again = [
        all(map(torch.equal, both(layer, shards), first)) for _ in range(REPEATS)
    ]  # all of them, for every rank takes part
    return all(gathered(all(again), exchange))


def host_ms(call: Callable[[], object]) -> float:
    """Of one call on an idle GPU: waits for counts are in it, and the queue never fills up. The median of ten."""
    spent = []
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        spent.append(1e3 * (time.perf_counter() - start))
    torch.cuda.synchronize()
    return round(statistics.median(spent), 3)


def gathered(x: float, exchange: Exchange) -> list[float]:
    """What each rank says."""
    found: list[Any] = [None] * exchange.size
    dist.all_gather_object(found, x, group=exchange.group)
    return found


def _rank(rank: int, options: argparse.Namespace, cases: Sequence[Case], rows: list[dict[str, Any]]) -> None:
    """Measure cases, and add what they say to the rows."""
    how: dict[str, Any] = {"init_method": f"file://{options.store}/{len(rows)}", "rank": rank, "world_size": options.ranks}
    if options.device == "cuda":
        torch.cuda.set_device(rank)
        urgent = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        how |= {"backend": "nccl", "device_id": torch.device("cuda", rank), "pg_options": urgent}
    dist.init_process_group(timeout=PATIENCE, **({"backend": "gloo"} | how))
    exchange = Exchange.over(dist.group.WORLD)
    assert exchange is not None
    for case in cases:
        begun = time.monotonic()
        rows.append(measure(case, exchange, options.device, options.warm))
        if rank == 0:
            print(f"{time.monotonic() - begun:.1f} s: {case.name}: {rows[-1]}", flush=True)
        if rank == 0 and not options.warm:
            keep(rows, options.out)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # Transformer Engine's atexit hooks can outlive the process group


def measured(cases: Sequence[Case], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Of every case a row. Where a rank fails none can go on, so that new ones take the cases after it."""
    rows: list[dict[str, Any]] = []
    while len(rows) < len(cases):
        try:
            spawn(_rank, args=(options, cases[len(rows) :], rows), nprocs=options.ranks)
        except Exception as error:  # of any rank
            if options.warm:
                raise
            rows = json.loads((options.out / "rings.json").read_text())["cases"]
            case, said = cases[len(rows)], str(error).strip()
            rows.append({"what": case.what, "tokens": case.tokens, "inner": case.inner, "failed": said.splitlines()[-1][:300]})
            print(f"{case.name}: failed: {said}", flush=True)
            keep(rows, options.out)
        else:
            return rows if options.warm else json.loads((options.out / "rings.json").read_text())["cases"]
    return rows


def keep(rows: list[dict[str, Any]], out: Path) -> None:
    """The table so far; documents beside a row of one document, ours beside dense attention."""
    ms = {(row["what"], row["tokens"], row["inner"]): row.get("fwd+bwd_ms, all") for row in rows}
    for row in rows:
        own = row.get("fwd+bwd_ms, all")
        other = ms.get(("lighthouse" if row["what"] in MEANS else "dense", row["tokens"], row["inner"]))
        beside = "time of one document" if row["what"] in MEANS else "time of dense"
        if own and other and row["what"] != "dense":
            row[beside] = round(own / other, 3)
    write_csv(out / "rings.csv", rows)
    (out / "rings.json").write_text(json.dumps({**environment(), "cases": rows}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "rings")
    parser.add_argument("--ranks", type=int, default=2, choices=(2, 4, 8))
    names = list(dict.fromkeys(case.what for case in CASES))
    parser.add_argument("--cases", nargs="+", default=names, choices=names)
    parser.add_argument("--lengths", nargs="+", type=int, default=BY_DEFAULT, choices=LENGTHS)
    parser.add_argument(
        "--inner", nargs="+", choices=("auto", *OVER_SHARDS), default=["auto"], help="of Lighthouse and dense attention"
    )
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    options.store = tempfile.mkdtemp()
    one_cudnn()
    shorter = SHORTER if options.device == "cpu" else 1
    cases = [
        replace(case, tokens=case.tokens // shorter, inner=inner)
        for case in CASES
        if case.what in options.cases and case.tokens in options.lengths
        for inner in (options.inner if case.what in BACKED else ["auto"])
    ]
    if not options.warm:
        keep([], options.out)
    if failed := [row["what"] for row in measured(cases, options) if "failed" in row]:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
