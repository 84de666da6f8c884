"""`python benchmarks/host_time.py --out FOLDER`: what one layer's attention costs the host, forward and backward, eagerly.

The core attention of Megatron's layer as this checkout builds it (and as the one at `--before PATH` does), Transformer
Engine's DotProductAttention where it is installed, and torch's scaled_dot_product_attention: the time from the call to its
return, with a queue of launches that never fills up and nothing waited for in between. Each has a process of its own. They
take turns, a few calls each, so that what else the host does meets all alike; medians, and the least, which other work hardly
touches. bf16, H = G = 8, D = 128. `--profile` prints, too, which functions of ours the time goes to. Leaves host_time.csv and
host_time.json.

`--no-launches` needs no GPU: what is timed is our Python alone, at 2,048 tokens (`no_launches.py`). It leaves no files.
"""

from __future__ import annotations

import argparse
import cProfile
import importlib
import json
import os
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import no_launches
import torch
import torch.distributed as dist
from csv_tables import write_csv
from torch import Tensor

HEADS, DIM = 8, 128
LENGTHS = (4096, 8192, 16384, 32768)
ROUNDS, CALLS = 60, 12
"""Turns of each; and calls between two waits: some 15 launches each, of the 1,024 that CUDA's queue holds."""

Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "host_time")
    parser.add_argument("--before", type=Path, help="another checkout, timed in the same run")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--no-launches", action="store_true", help="our Python alone, on a CPU")
    parser.add_argument("--profile", action="store_true", help="print where the time goes at the second length")
    parser.add_argument("--alone", choices=LAYERS, help="print times of one layer, as JSON, for each length read")
    options = parser.parse_args()
    if options.no_launches:
        options.lengths = [2048]
    if options.alone:
        alone(LAYERS[options.alone], options.lengths, options.no_launches)
        return
    given = ["--lengths", *map(str, options.lengths), *(["--no-launches"] if options.no_launches else [])]
    here = Path(__file__).parents[1]
    timers = {"lighthouse": timer("lighthouse", here, given)}
    if options.before:
        timers["lighthouse before"] = timer("lighthouse", options.before, given)
    if not options.no_launches:
        if find_spec("transformer_engine"):
            timers["Transformer Engine"] = timer("Transformer Engine", here, given)
        timers["torch"] = timer("torch", here, given)
    rows = []
    for length in options.lengths:
        times: dict[str, list[float]] = {what: [] for what in timers}
        for turn in range(ROUNDS * (5 if options.no_launches else 1) + 2):
            for what, times_of in timers.items():
                found = times_of(length)
                times[what] += found if turn > 1 else []  # the first turns compile
        rows += [{"what": what, "N": length, "us": _median(us), "least_us": round(min(us), 1)} for what, us in times.items()]
    for row in rows:
        print(f"{row['what']:20} {row['N']:7,} tokens {row['us']:8.0f} us, at least {row['least_us']:8.0f}")
    if options.profile:  # before anything asks torch for cuDNN, whose libraries Transformer Engine would load otherwise
        prepare(options.no_launches)
        length = options.lengths[:2][-1]
        call = once(core_attention(length), length)
        if options.no_launches:
            call()  # builds its layer
            no_launches.as_if_initialized()
        profile(call, length)
    if not options.no_launches:
        write(options.out, rows)


def prepare(without_launches: bool) -> None:
    """What Megatron's layers ask for."""
    if without_launches:
        no_launches.install()
    store = f"file://{tempfile.mkdtemp()}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    importlib.import_module("megatron.core.parallel_state").initialize_model_parallel()


def alone(layer: Callable[[int], Layer], lengths: list[int], without_launches: bool) -> None:
    """Times of one layer, for each length that is read."""
    prepare(without_launches)
    calls = {length: once(layer(length), length) for length in lengths}
    if without_launches:
        no_launches.as_if_initialized()
    for line in sys.stdin:
        print(json.dumps(host_us(calls[int(line)])), flush=True)


def write(out: Path, rows: list[dict[str, Any]]) -> None:
    """host_time.csv, and host_time.json: the machine and its software."""
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "host_time.csv", rows)
    from megatron_lighthouse.versions import environment  # not in a process for another checkout, which may lack it

    (out / "host_time.json").write_text(json.dumps(environment(), indent=2) + "\n")


def core_attention(length: int) -> Layer:
    """The core attention of a layer as Megatron gets it, with a budget of N/64, at least 128."""
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_lighthouse import LighthouseConfig

    shape: dict[str, Any] = {"num_layers": 1, "hidden_size": HEADS * DIM, "num_attention_heads": HEADS}
    config = TransformerConfig(**shape, attention_dropout=0.0, bf16=True, params_dtype=torch.bfloat16)
    given = LighthouseConfig(3, 4, max(128, length // 64))
    settings = _either("command_line.settings", "settings").LighthouseSettings(given, dense_first=0, dense_last=0)
    builder = _either("attention.core_attention", "core_attention").CoreAttentionBuilder(DotProductAttention, settings)
    layer = builder(config=config, layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self")
    return lambda q, k, v: layer(q, k, v, None, attn_mask_type=AttnMaskType.causal)


def _either(*names: str) -> Any:
    """The module of the first of these names under mcore/: older checkouts have other names."""
    for name in names[:-1]:
        try:
            return importlib.import_module(f"megatron_lighthouse.mcore.{name}")
        except ModuleNotFoundError:
            pass
    return importlib.import_module(f"megatron_lighthouse.mcore.{names[-1]}")


def timer(what: str, checkout: Path, given: list[str]) -> Callable[[int], list[float]]:
    """The times of a layer of a checkout, by this very script in a process of its own, which waits meanwhile."""
    paths = [str(checkout.resolve()), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, __file__, "--alone", what, *given]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    child = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    asked, answers = child.stdin, child.stdout
    assert asked is not None
    assert answers is not None

    def times(length: int) -> list[float]:
        print(length, file=asked, flush=True)
        for line in answers:
            if line.startswith("["):  # what it says at its start comes before
                found: list[float] = json.loads(line)
                return found
        raise RuntimeError(f"the process for {what} of {checkout} ended, see above")

    return times


def transformer_engine(length: int) -> Layer:
    from transformer_engine.pytorch import DotProductAttention

    layer = DotProductAttention(HEADS, DIM, attention_dropout=0.0, attn_mask_type="causal").cuda()
    return lambda q, k, v: layer(q, k, v, qkv_format="sbhd")


def of_torch(length: int) -> Layer:
    return torch_attention


def torch_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).permute(2, 0, 1, 3).flatten(2)


LAYERS: dict[str, Callable[[int], Layer]] = {
    "lighthouse": core_attention,
    "Transformer Engine": transformer_engine,
    "torch": of_torch,
}
"""By what is timed: a layer for so many tokens."""


def once(layer: Layer, length: int) -> Callable[[], object]:
    shape, where = (length, 1, HEADS, DIM), "cuda" if torch.cuda.is_available() else "cpu"
    inputs = [torch.randn(shape, device=where, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    grad = torch.randn(length, 1, HEADS * DIM, device=where, dtype=torch.bfloat16)
    return lambda: torch.autograd.grad(layer(*inputs), inputs, grad)


def host_us(call: Callable[[], object]) -> list[float]:
    """Microseconds of the host for each of some calls and their backwards."""
    torch.cuda.synchronize()
    times = []
    for _ in range(CALLS):
        begin = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - begin))
    torch.cuda.synchronize()
    return times


def _median(us: list[float]) -> float:
    return round(statistics.median(us), 1)


def profile(call: Callable[[], object], length: int) -> None:
    """By function; backward runs in this thread, for a profile sees no other."""
    found = cProfile.Profile()
    with torch.autograd.set_multithreading_enabled(False):
        for _ in range(5):
            call()
        for _ in range(ROUNDS):
            torch.cuda.synchronize()
            found.enable()
            for _ in range(CALLS):
                call()
            found.disable()
    print(f"{ROUNDS * CALLS} calls of {length:,} tokens, by the time in a function itself:")
    pstats.Stats(found).sort_stats("tottime").print_stats(40)


if __name__ == "__main__":
    main()
