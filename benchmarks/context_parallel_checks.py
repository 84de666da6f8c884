"""Checks of benchmarks/context_parallel.py: all ranks against one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from context_parallel_layers import COMM_TYPES, HAS_TE, both, exchange_of, inputs, lighthouse, shares_out, te_attention
from torch import Tensor

from megatron_lighthouse import LighthouseConfig
from megatron_lighthouse.lighthouse.attention import lighthouse_select
from megatron_lighthouse.lighthouse.scorers import SCORERS
from megatron_lighthouse.softmax.backends import Attend

SHAPES = {
    "N=16384 H=G=8, tiles within chunks": (16384, 1, 8, 8, LighthouseConfig(3, 4, 512, 32)),  # of 2, 4 and 8 ranks
    "N=16384 H=8 G=2 B=2, one tile": (16384, 2, 8, 2, LighthouseConfig(3, 4, 512, 512)),
    "N=32768 L=4 H=G=8, tiles span chunks": (32768, 1, 8, 8, LighthouseConfig(4, 4, 256, 128)),
}
REPEATS = 10
FP32 = 1e-4
"""More than this no element of an output or gradient may be off in fp32."""


def check(group: dist.ProcessGroup, scorers: list[str], save: Callable[[dict[str, Any]], None]) -> None:
    """Errors in norms, relative to one rank's result, by shape and way of attending; saved as they come.

    The selection by each of `scorers` comes last: flash-linear-attention's first call, for `gla`, tunes for minutes.
    """
    result: dict[str, Any] = {}
    for title, (length, batch, heads, groups, config) in SHAPES.items():
        q, k, v, grad = inputs(length, batch, heads, groups, 128)
        whole = both(lighthouse(config), (q, k, v, grad))
        errors = {"one rank, cudnn against fa2": _errors(both(_layer(config, "fa2"), (q, k, v, grad)), whole)}
        exchange = exchange_of(group)
        shards = [exchange.own(x) for x in (q, k, v, grad)]
        for inner in ("cudnn", "fa2"):
            for comm_type in COMM_TYPES:
                if not shares_out(comm_type, groups, exchange.size):
                    continue
                parts = both(_layer(config, inner, group, comm_type), shards)
                errors[f"{inner} {comm_type}"] = _errors([_whole(x, group) for x in parts], whole)
        if HAS_TE:
            for comm_type in COMM_TYPES:
                if not shares_out(comm_type, groups, exchange.size):
                    continue
                attend = te_attention(group, heads, groups, 128, comm_type)
                parts = both(lighthouse(config, cp_group=group, attend=attend), shards)
                errors[f"te {comm_type}"] = _errors([_whole(x, group) for x in parts], whole)
        result[title] = errors
        save(result)
        _say(f"{title}: {errors}")
    result["fp32, greatest distance of any element"] = _fp32(group)
    result["repeats to the bit"] = _repeats(group)
    save(result)
    _say(str({k: v for k, v in result.items() if k not in SHAPES}))
    result["identical selections"] = {}
    for scorer in sorted(scorers, key=lambda scorer: not SCORERS[scorer].same_bits):
        for title, (length, batch, heads, groups, config) in SHAPES.items():
            q, k, v, _ = inputs(length, batch, heads, groups, 128)
            result["identical selections"][f"{scorer}, {title}"] = _same_selection(
                q, k, v, config.replace(scorer=scorer), group
            )
            save(result)


def _layer(config: LighthouseConfig, inner: str, group: dist.ProcessGroup | None = None, comm_type: str = "p2p") -> Attend:
    return lighthouse(config.replace(inner=inner), cp_group=group, cp_comm_type=comm_type)


def _whole(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    exchange = exchange_of(group)
    return exchange.in_order(exchange.all_gather(x, "check"))


def _errors(found: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
    norms = {
        name: ((a.double() - b.double()).norm() / b.double().norm()).item()
        for name, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True)
    }
    if not all(x < 2e-2 for x in norms.values()):
        raise SystemExit(f"results differ: {norms}")
    return {name: float(f"{x:.2e}") for name, x in norms.items()}


def _same_selection(q: Tensor, k: Tensor, v: Tensor, config: LighthouseConfig, group: dist.ProcessGroup) -> float | str:
    """The share of entries that all ranks select as one does; must be all of them but for `gla`, whose sums are not ours."""
    exchange = exchange_of(group)
    try:
        expected = lighthouse_select(q, k, config, value=v)
    except ValueError as error:  # a scorer whose package is not installed
        _say(str(error))
        return str(error)
    own = lighthouse_select(exchange.own(q), exchange.own(k), config, value=exchange.own(v), cp_group=group)
    found = _whole(own.movedim(-1, 0), group).movedim(0, -1)
    exact = SCORERS[config.scorer].same_bits
    same = float(torch.equal(found, expected)) if exact else torch.isin(found, expected).double().mean().item()
    _say(f"selection by {config.scorer}: {100 * same:.2f}% alike")
    if same < (1 if exact else 0.99):
        raise SystemExit(f"selection by {config.scorer} differs between {exchange.size} ranks and one")
    return same


def _fp32(group: dist.ProcessGroup) -> float:
    """The greatest distance of any element of output and gradients from one rank's, over all schemes."""
    config = LighthouseConfig(3, 4, 128, 128, inner="sdpa")
    tensors = inputs(4096, 1, 8, 8, 64, torch.float32)
    whole = both(lighthouse(config), tensors)
    shards = [exchange_of(group).own(x) for x in tensors]
    found = [both(_layer(config, "sdpa", group, comm_type), shards) for comm_type in COMM_TYPES]
    worst = max((_whole(a, group) - b).abs().max().item() for parts in found for a, b in zip(parts, whole, strict=True))
    if not worst < FP32:
        raise SystemExit(f"in fp32 an element is off by {worst}, and may be by {FP32}")
    return worst


def _repeats(group: dist.ProcessGroup) -> dict[str, bool]:
    """Whether output and gradients are the same bits in each of REPEATS runs, under torch's deterministic algorithms."""
    config = LighthouseConfig(3, 4, 512, 128)
    shards = [exchange_of(group).own(x) for x in inputs(16384, 1, 8, 8, 128)]
    layers = {f"fa2 {comm_type}": _layer(config, "fa2", group, comm_type) for comm_type in COMM_TYPES}
    one_tile = config.replace(tile_budget=512)
    layers["fa2 p2p, one tile"] = _layer(one_tile, "fa2", group)
    if HAS_TE:
        for comm_type in COMM_TYPES:
            attend = te_attention(group, 8, 8, 128, comm_type)
            layers[f"te {comm_type}"] = lighthouse(config, cp_group=group, attend=attend)
    torch.use_deterministic_algorithms(True)
    result = {}
    for name, layer in layers.items():
        first = both(layer, shards)
        again = [all(map(torch.equal, both(layer, shards), first)) for _ in range(REPEATS)]  # all: every rank takes part
        every = torch.tensor([all(again)], device="cuda", dtype=torch.int32)
        dist.all_reduce(every, dist.ReduceOp.MIN)
        result[name] = bool(every.item())
    torch.use_deterministic_algorithms(False)
    return result


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)
