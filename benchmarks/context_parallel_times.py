"""Times of benchmarks/context_parallel.py: one rank and all ranks on the same total of tokens, in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from context_parallel_layers import COMM_TYPES, HAS_TE, both, exchange_of, inputs, lighthouse, te_attention
from torch import Tensor

from megatron_lighthouse import LighthouseConfig
from megatron_lighthouse.context_parallel import exchange as exchange_module
from megatron_lighthouse.context_parallel.exchange import Exchange
from megatron_lighthouse.softmax.backends import Attend, inner_attention
from megatron_lighthouse.softmax.sharded import sharded_attention

TIMED = {
    "96K": (98304, LighthouseConfig(3, 4, 1536)),
    "256K": (262144, LighthouseConfig(3, 4, 2048)),
    "512K": (524288, LighthouseConfig(3, 4, 4096)),
    "1M": (1048576, LighthouseConfig(4, 4, 4096)),
    "128K": (131072, LighthouseConfig(3, 4, 1024)),
    "1M-L3": (1048576, LighthouseConfig(3, 4, 8192)),
}
CASES = ("96K", "256K", "512K", "1M")
"""Timed where no others are asked for."""
DENSE = 2**37
"""N²/C up to which dense attention is timed too: two seconds on H100s."""
HEADS, DIM = 8, 128
TRACED = "96K"


def time_case(name: str, group: dist.ProcessGroup, quick: bool, out: Path) -> list[dict[str, Any]]:
    """Rows of the table for one sequence length."""
    length, config = TIMED[name]
    exchange = exchange_of(group)
    tensors = inputs(length, 1, HEADS, HEADS, DIM)
    shards = [exchange.own(x) for x in tensors]
    rows: list[dict[str, Any]] = []

    def add(what: str, ranks: int, layer: Attend, given: list[Tensor], **more: Any) -> dict[str, Any]:
        row = {"case": name, "N": length, "what": what, "ranks": ranks, **times_of(layer, given), **more}
        rows.append(row)
        if dist.get_rank() == 0:
            print(row, flush=True)
        return row

    one = add("lighthouse", 1, lighthouse(config), tensors)
    if not quick and length < 2**20:
        geometry = config.geometry(length)
        gathered = [x[: geometry.gathered_length].contiguous() for x in tensors]
        add("inner alone", 1, inner_attention("auto", gathered[0], gathered[1]), gathered)
        for comm_type in COMM_TYPES:
            over_shards = sharded_attention("auto", gathered[0], gathered[1], exchange, comm_type)
            add(f"inner alone {comm_type}", exchange.size, over_shards, [exchange.own(x) for x in gathered])
    for comm_type in COMM_TYPES[:1] if quick else COMM_TYPES:
        layer = lighthouse(config, cp_group=group, cp_comm_type=comm_type)
        with silent(exchange):
            alone = times_of(layer, shards)
        row = add(f"lighthouse {comm_type}", exchange.size, layer, shards)
        if config.geometry(length, exchange.size).is_local(exchange.size):  # else the host waits for the GPU
            row["host_ms"] = _host_ms(partial(both, layer, shards))
        row["exposed_communication"] = round(1 - alone["fwd+bwd_ms"] / row["fwd+bwd_ms"], 4)
        row["efficiency"] = round(one["fwd+bwd_ms"] / row["fwd+bwd_ms"] / exchange.size, 4)
        if dist.get_rank() == 0:
            print({key: row[key] for key in ("efficiency", "exposed_communication", "host_ms") if key in row}, flush=True)
        if name == TRACED and comm_type == "p2p":
            _trace(layer, shards, out)
    if HAS_TE and not quick:
        for comm_type in COMM_TYPES:
            attend = te_attention(group, HEADS, HEADS, DIM, comm_type)
            layer = lighthouse(config, cp_group=group, attend=attend)
            add(f"lighthouse, TE {comm_type}", exchange.size, layer, shards)
    if length**2 <= DENSE * exchange.size:
        add("dense p2p", exchange.size, sharded_attention("auto", shards[0], shards[1], exchange, "p2p"), shards)
        if HAS_TE and not quick:
            add("dense, TE p2p", exchange.size, te_attention(group, HEADS, HEADS, DIM), shards)
    return rows


def times_of(layer: Callable[..., Tensor], tensors: list[Tensor]) -> dict[str, Any]:
    """Milliseconds of the slowest rank, and GiB above what was allocated; `tensors` are inputs, and the output's gradient."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both(layer, tensors)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    forward = of_slowest_ms(lambda: layer(*tensors[:-1]))
    return {"fwd_ms": forward, "fwd+bwd_ms": of_slowest_ms(lambda: both(layer, tensors)), "peak_gib": round(peak, 3)}


def of_slowest_ms(call: Callable[[], object]) -> float:
    """Median milliseconds of one call, of the slowest rank; all ranks' GPUs begin at once and have the host ahead of them."""
    _timed(call, 1)
    rough = _timed(call, 1)
    calls = max(1, min(_calls(10), int(30 / rough)))
    return round(statistics.median(_timed(call, calls) for _ in range(5 if rough < 500 else 1)), 4)


def _calls(of_two: int) -> int:
    """Calls in a row that fit into the GPU's queue of 1024 kernels: each other rank adds some to a call."""
    return max(1, 2 * of_two // dist.get_world_size())


def _host_ms(call: Callable[[], object]) -> float:
    """Milliseconds that Python takes for one call, the GPU not waited for."""
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)
    start = time.perf_counter()
    calls = _calls(5)
    for _ in range(calls):
        call()
    ms = (time.perf_counter() - start) * 1000 / calls
    torch.cuda.synchronize()
    return round(ms, 3)


def _timed(call: Callable[[], object], calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    meet = torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    dist.barrier()
    torch.cuda._sleep(10_000_000 * calls * dist.get_world_size())
    dist.all_reduce(meet)
    start.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    ms = torch.tensor(start.elapsed_time(end) / calls, device="cuda")
    dist.all_reduce(ms, dist.ReduceOp.MAX)
    return ms.item()


@contextmanager
def silent(exchange: Exchange) -> Iterator[None]:
    """Nothing travels: what a layer takes then is its work alone, and the rest communication that is not hidden behind it.

    Where ranks would exchange scores, each takes its own for those of all: garbage would select rows that are not there.
    """

    def all_gather(self: Exchange, x: Tensor, purpose: str) -> Tensor:
        return x.expand(self.size, *x.shape) if purpose == "select" else x.new_empty(self.size, *x.shape)

    def all_to_all(self: Exchange, x: Tensor, purpose: str, to: Any = None, by: Any = None) -> Tensor:
        return x.new_empty(x.shape[0] if by is None else sum(by), *x.shape[1:])

    def start(self: Exchange, sends: Any, receives: Any, purpose: str) -> list[Any]:
        return []

    with (
        mock.patch.multiple(exchange_module.Exchange, all_gather=all_gather, all_to_all=all_to_all, start=start),
        mock.patch.object(exchange_module, "copies_over", return_value="silent"),
    ):
        yield


def _trace(layer: Attend, tensors: list[Tensor], out: Path) -> None:
    """Leave a trace of one step, and print where its time goes."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(3):
            both(layer, tensors)
        torch.cuda.synchronize()
    if dist.get_rank() == 0:
        profile.export_chrome_trace(str(out / "trace.json.gz"))
        print(profile.key_averages().table(sort_by="cuda_time_total", row_limit=25, max_name_column_width=60), flush=True)
