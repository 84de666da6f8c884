"""`python benchmarks/graphs_cp.py --out FOLDER`: layers over the shards of two GPUs, captured in CUDA graphs.

A Lighthouse layer and dense attention over shards by `p2p`, each forward and backward: as one graph, as Megatron's
`full_iteration` has them, and as two, as its `local` has. Each is replayed 100 times, every time with other inputs copied in,
and held to the same call without a graph: to the bit, with deterministic attention. Then the times without that, by `--inner`:
medians of single calls, and from call to call where the GPU is never waited for; beside them that of the whole sequence on one
GPU, in a graph too. Leaves graphs_cp.csv and graphs_cp.json, as far as it came, after every case.

Over NCCL and copies between the GPUs of one machine; `--by-nccl` leaves all to NCCL. `--one-gpu` has two processes on one GPU,
which copy to each other, the halo too, for NCCL refuses that; its times say nothing. Ends within `--within` seconds: a rank
that fails or hangs takes the other with it, and the last line of each says how far it came.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from csv_tables import write_csv
from measure import host_ms, median_ms
from torch import Tensor

from megatron_lighthouse import LighthouseConfig, lighthouse_attention
from megatron_lighthouse.context_parallel import copies as copies_module
from megatron_lighthouse.context_parallel.copies import Copies, Message
from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.context_parallel.gpu import Gpu
from megatron_lighthouse.context_parallel.schemes import SWITCH
from megatron_lighthouse.softmax.backends import inner_attention
from megatron_lighthouse.softmax.names import OVER_SHARDS
from megatron_lighthouse.softmax.sharded import sharded_attention
from megatron_lighthouse.versions import environment

RANKS, HEADS, DIM = 2, 8, 128
CASES = {
    **{"dense 16384": 16384, "lighthouse 32768": 32768, "dense 32768": 32768},
    **{f"lighthouse {n}": n for n in (98304, 262144, 524288)},
}
"""Tokens of the whole sequence."""
REPLAYS = 100
SO_MANY: dict[str, Any] = {"seconds": 1e6, "most": 30}
"""Calls that are timed: as many on each rank, whatever they take there, or one would wait for calls that do not come."""
Step = Callable[[], list[Tensor]]


@dataclass
class Given:
    """A layer's inputs on this rank, which stay where they are: graphs read them there."""

    leaves: list[Tensor]
    grad: Tensor

    @staticmethod
    def of(rows: int) -> Given:
        shape = rows, 1, HEADS, DIM
        *leaves, grad = (torch.empty(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
        given = Given([x.requires_grad_() for x in leaves], grad)
        given.draw(0)
        return given

    @torch.no_grad()
    def draw(self, seed: int) -> None:
        """Others, not the same on two ranks."""
        numbers = torch.Generator("cuda").manual_seed(RANKS * seed + dist.get_rank())
        for x in (*self.leaves, self.grad):
            x.copy_(torch.randn(x.shape, device="cuda", generator=numbers))


def layer_of(name: str, given: Given, inner: str = "auto", alone: bool = False) -> Callable[[], Tensor]:
    """The layer of that case, over this rank's rows or `alone` over all; made anew for each kind of attention inside."""
    query, key, value = given.leaves
    exchange = None if alone else Exchange.over(dist.group.WORLD)
    if name.startswith("dense"):
        attend = sharded_attention(inner, query, key, exchange, "p2p") if exchange else inner_attention(inner, query, key)
        return lambda: attend(query, key, value)
    # tiles that no rank has to deal out
    budget = CASES[name] // (64 if CASES[name] <= 131072 else 128)
    config = LighthouseConfig(3, 4, budget, tile_budget=budget // 16, inner=inner)
    return lambda: lighthouse_attention(query, key, value, config, cp_group=exchange.group if exchange else None)


def captured(forward: Callable[[], Tensor], given: Given, graphs: int) -> tuple[Step, list[Tensor]]:
    """What replays it, and where its results then are; called without a graph first, as Megatron does."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            both(forward, given)
    torch.cuda.current_stream().wait_stream(side)
    pool, made = torch.cuda.graph_pool_handle(), [torch.cuda.CUDAGraph() for _ in range(graphs)]
    if graphs == 1:
        with torch.cuda.graph(made[0], pool=pool):
            results = both(forward, given)
    else:
        with torch.cuda.graph(made[0], pool=pool):
            out = forward()
        with torch.cuda.graph(made[1], pool=pool):
            results = [out.detach(), *torch.autograd.grad(out, given.leaves, given.grad)]

    def replay() -> list[Tensor]:
        for graph in made:
            graph.replay()
        return results

    return replay, results


def both(forward: Callable[[], Tensor], given: Given) -> list[Tensor]:
    """Output and gradients."""
    out = forward()
    return [out.detach(), *torch.autograd.grad(out, given.leaves, given.grad)]


def check(name: str, graphs: int, inner: str) -> dict[str, Any]:
    """Whether replays give the bits of calls without a graph; by `auto` where `inner` does not repeat itself."""
    given = Given.of(CASES[name] // RANKS)
    deterministic(True)
    forward = layer_of(name, given, "auto" if inner == "cudnn" else inner)
    began = time.monotonic()
    replay, results = captured(forward, given, graphs)
    torch.cuda.synchronize()
    row: dict[str, Any] = {"seconds to capture": round(time.monotonic() - began, 2)}
    wrong, begun = 0, time.monotonic()
    for seed in range(1, REPLAYS + 1):
        given.draw(seed)
        replay()
        found = [x.clone() for x in results]
        wrong += not all(map(torch.equal, found, both(forward, given)))
    for seed in range(10):  # one after another, nobody waiting for the GPU
        given.draw(seed)
        replay()
    wrong += not all(map(torch.equal, results, both(forward, given)))
    return row | {"replays": REPLAYS, "with other bits": wrong, "seconds for them": round(time.monotonic() - begun, 2)}


def timed(name: str, graphs: int, inner: str) -> dict[str, Any]:
    deterministic(False)
    whole = Given.of(CASES[name])
    replay, _ = captured(layer_of(name, whole, inner, alone=True), whole, graphs)
    row: dict[str, Any] = {"inner": inner, "one GPU's ms": round(median_ms([replay], **SO_MANY), 4)}
    given = Given.of(CASES[name] // RANKS)
    forward = layer_of(name, given, inner)
    replay, _ = captured(forward, given, graphs)
    for how, call in (("eager", lambda: both(forward, given)), ("graph", replay)):
        dist.barrier()
        torch.cuda.synchronize()
        row[f"{how} ms"] = round(median_ms([call], **SO_MANY), 4)
        dist.barrier()
        row[f"{how} ms from call to call"] = round(statistics.median(host_ms(call) for _ in range(3)), 4)
    return row | {"efficiency": round(row["one GPU's ms"] / RANKS / row["graph ms from call to call"], 4)}


def deterministic(on: bool) -> None:
    torch.use_deterministic_algorithms(on)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


class Halo:
    """A halo that goes by copies, between two ranks: what `Exchange.start` gives for one to wait for."""

    def __init__(self, message: Message, target: Tensor) -> None:
        self.message, self.target = message, target

    def wait(self) -> None:
        self.target.copy_(self.message.open()[0])
        self.message.close()


def copy_on_one_gpu(device: torch.device) -> None:
    """Have both processes copy into each other's memory of one GPU, which a run is not to do, the halo too."""
    assert dist.group.WORLD is not None
    group = dist.group.WORLD
    copies = Copies(group.rank(), RANKS, Gpu(group, device))
    copies_module._of_group[group] = copies

    def start(exchange: Exchange, sends: Sequence[Any], receives: Sequence[Any], purpose: str) -> list[Any]:
        ((x, _),), ((target, _),) = sends, receives  # of two ranks
        return [Halo(copies.send("halo", [x.contiguous()], 1, [target.shape], x.nbytes), target)]

    setattr(Exchange, "start", start)  # noqa: B010


def rank_of(rank: int, options: argparse.Namespace, store: str) -> None:
    device = torch.device("cuda", 0 if options.one_gpu else rank)
    torch.cuda.set_device(device)
    meet: dict[str, Any] = {"init_method": f"file://{store}/store", "rank": rank, "world_size": RANKS}
    if options.one_gpu:
        dist.init_process_group("gloo", timeout=timedelta(seconds=40), **meet)
        copy_on_one_gpu(device)
    else:
        dist.init_process_group("nccl", timeout=timedelta(seconds=40), device_id=device, **meet)
    rows: list[dict[str, Any]] = []
    for name in options.cases:
        for graphs in options.graphs:
            row: dict[str, Any] = {"case": name, "graphs": graphs}
            for part in (check, timed):
                print(f"rank {rank}: {time.monotonic() - options.began:.1f} s: {part.__name__} {name}, {graphs}", flush=True)
                row |= part(name, graphs, options.inner)
            of_ranks: list[Any] = [None] * RANKS
            dist.all_gather_object(of_ranks, row["with other bits"])
            rows.append({**row, "with other bits": max(of_ranks)})
            if rank == 0:
                print(json.dumps(rows[-1]), flush=True)
                write_csv(options.out / "graphs_cp.csv", rows)
                how = "one GPU" if options.one_gpu else "NCCL" if options.by_nccl else "copies"
                (options.out / "graphs_cp.json").write_text(
                    json.dumps({**environment(), "by": how, "rows": rows}, indent=2) + "\n"
                )
    if any(row["with other bits"] for row in rows):
        raise SystemExit(f"rank {rank}: a graph gave other bits than the calls without.")
    print(f"rank {rank}: done", flush=True)
    os._exit(0)  # a process group of NCCL whose work graphs hold can take long to go


def watched(processes: Sequence[BaseProcess], end: float) -> str | None:
    """Waits for all, until one fails or `end` of time.monotonic(); then the others are killed. Answers what went wrong."""
    problem = None
    while problem is None and any(one.exitcode is None for one in processes):
        failed = [f"{one.name} failed: {one.exitcode}" for one in processes if one.exitcode]
        problem = failed[0] if failed else "the time is over" if time.monotonic() > end else None
        time.sleep(0.1)
    for one in processes:
        if problem and one.exitcode is None:
            one.kill()
        one.join()
    return problem or next((f"{one.name} failed: {one.exitcode}" for one in processes if one.exitcode), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "graphs_cp")
    parser.add_argument("--cases", nargs="+", default=list(CASES)[:3], choices=list(CASES))
    parser.add_argument("--graphs", type=int, nargs="+", default=[1, 2], choices=[1, 2], help="into how many each is captured")
    parser.add_argument("--inner", choices=["auto", *OVER_SHARDS], default="cudnn", help="whose times")
    parser.add_argument("--one-gpu", action="store_true")
    parser.add_argument("--by-nccl", action="store_true")
    parser.add_argument("--within", type=float, default=85, metavar="SECONDS")
    options = parser.parse_args()
    options.began = time.monotonic()
    if options.one_gpu and options.by_nccl:
        parser.error("--one-gpu with --by-nccl: NCCL takes one process a GPU: leave one of them out.")
    need = 1 if options.one_gpu else RANKS
    if torch.cuda.device_count() < need:
        parser.error(f"{need} GPUs are needed, and {torch.cuda.device_count()} are visible: --one-gpu takes one.")
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ["NCCL_GRAPH_REGISTER"] = "0"
    if options.one_gpu:
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    if options.by_nccl:
        os.environ[SWITCH] = "0"
    spawning, store = multiprocessing.get_context("spawn"), tempfile.mkdtemp()
    processes = [spawning.Process(target=rank_of, args=(i, options, store), name=f"rank {i}") for i in range(RANKS)]
    for one in processes:
        one.start()
    if problem := watched(processes, options.began + options.within):
        raise SystemExit(f"graphs_cp: {problem}.")


if __name__ == "__main__":
    main()
