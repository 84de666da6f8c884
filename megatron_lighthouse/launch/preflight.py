"""`python -m megatron_lighthouse.launch.preflight`: are the nodes of this job fit to train? One task a node, by srun.

Each node reports its GPUs, versions, memory errors and what it cannot import. The first compares, names the bad nodes, and all
end with 1. If there are none, a short all-reduce follows: NCCL where there are GPUs, gloo else. Where that fails every node
says so and ends with 1, and which of them is at fault is not known. Where nodes do not meet, those that find out end with 75:
another start may help.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib import import_module

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from megatron_lighthouse.mcore.command_line import flags, run_options
from megatron_lighthouse.mcore.command_line.entry import with_all_arguments
from megatron_lighthouse.mcore.data import tokenizers
from megatron_lighthouse.usage import Parser

UNMET = 75
"""The exit status where nodes did not meet, which pretrain.sbatch knows: EX_TEMPFAIL."""
REDUCE = timedelta(seconds=120)
"""For either of the all-reduce's sums, and half of what both may take with NCCL's start."""


@dataclass(frozen=True)
class Report:
    """What one node says of itself."""

    host: str
    gpus: int | None
    """None where neither a driver nor torch sees a GPU's tools."""
    versions: dict[str, str]
    errors: list[str]
    """Modules that cannot be imported, GPUs with uncorrected memory errors, and GPUs that do not compute."""


def main(argv: Sequence[str] | None = None) -> int:
    """Report, compare, reduce; answers an exit status."""
    parser = Parser(prog="python -m megatron_lighthouse.launch.preflight", description=__doc__)
    parser.add_argument("--gpus-per-node", type=int, required=True, help="GPUs that each node must have")
    parser.add_argument("--arch", choices=["blackwell", "hopper", "cpu"], required=True, help="cpu asks for no GPUs")
    parser.add_argument("--seconds", type=float, default=600, help="how long to wait for a node (default: %(default)s)")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="-- ARGUMENTS", help="of the run: what they need is imported"
    )
    options = parser.parse_args(argv)
    rank, size = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    hosts = os.environ["LIGHTHOUSE_NODES"].split()
    wait, port = timedelta(seconds=options.seconds), int(os.environ["MASTER_PORT"])
    own = report(needs(options.arguments[1:], options.arch))
    try:
        store = TCPStore(os.environ["MASTER_ADDR"], port, size, rank == 0, wait, False)
        store.set(f"report/{rank}", json.dumps(asdict(own)))
        reports = list(_reports(store, hosts, time.monotonic() + options.seconds)) if rank == 0 else []
        if rank == 0:
            missing = [host for host, found in zip(hosts, reports, strict=True) if found is None]
            found = [report for report in reports if report]
            problems = [*findings(found, options.gpus_per_node, options.arch)]
            for line in (*_silent(missing, options.seconds), *problems):
                print(f"preflight: {line}", file=sys.stderr)
            store.set("verdict", str(1 if problems else UNMET if missing else 0))
        store.wait(["verdict"], 2 * wait)
        verdict = int(store.get("verdict"))
    except (dist.DistError, RuntimeError) as error:
        what = "reach" if rank else "listen on"
        print(f"preflight: {hosts[rank]}: cannot {what} {hosts[0]}, port {port}: {error}", file=sys.stderr)
        return UNMET
    if verdict:
        return _leave(store, rank, size, verdict)
    try:
        with at_most(2 * REDUCE.total_seconds()):
            seconds = all_reduce(store, rank, size, REDUCE)
    except (dist.DistError, RuntimeError) as error:
        print(f"preflight: {hosts[rank]}: {error}", file=sys.stderr)
        return 1
    if rank == 0:
        print(f"preflight: {size} nodes are fit: {_say(found[0])}; all-reduce of 4 MiB {1000 * seconds:.1f} ms", flush=True)
    return _leave(store, rank, size, 0)


def needs(words: Sequence[str], arch: str) -> list[str]:
    """The modules that a run with these words imports sooner or later; without GPUs those that Megatron's tokenizers want."""
    args, _ = flags.parse(words, with_all_arguments, strict=False)
    found = [*tokenizers.packages(args.tokenizer_type)]
    if arch == "cpu":  # the rest a run shows as soon itself
        return found
    if args.transformer_impl == "transformer_engine":
        found.append("transformer_engine.pytorch")
    found += [module for _, module, _ in run_options.of_kernels(args)]
    return ["megatron.training", "triton", *found]


def report(needs: Sequence[str] = ()) -> Report:
    """Of the node that this runs on, and whether it can import what a run `needs`."""
    versions = {"torch": str(torch.__version__)}
    errors = []
    for name in needs:
        try:
            import_module(name)
        except Exception as error:  # a library that does not fit may raise anything
            errors.append(f"{name} cannot be imported by {sys.executable}: {type(error).__name__}: {error}")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else None
    if gpus:
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        for device in range(gpus):
            try:
                torch.ones(1 << 20, device=f"cuda:{device}").sum().item()
            except RuntimeError as error:
                errors.append(f"GPU {device}: {str(error).splitlines()[0]}")
    if shutil.which("nvidia-smi"):
        rows = _nvidia_smi("driver_version", "ecc.errors.uncorrected.volatile.total")
        gpus = len(rows) if gpus is None else min(gpus, len(rows))
        for number, (driver, count) in enumerate(rows):
            versions["driver"] = driver
            if count.isdigit() and int(count):
                errors.append(f"GPU {number}: {count} uncorrected ECC errors")
    return Report(socket.gethostname(), gpus, versions, errors)


def _nvidia_smi(*fields: str) -> list[list[str]]:
    """One row a GPU; none where the driver does not answer."""
    command = ["nvidia-smi", "--query-gpu=" + ",".join(fields), "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines()]
    return [row for row in rows if len(row) == len(fields)] if answer.returncode == 0 else []


def findings(reports: Sequence[Report], gpus: int, arch: str) -> Iterator[str]:
    """What is wrong, each line beginning with the node's name. Of versions, those that most nodes have are right."""
    for node in reports:
        if arch != "cpu" and node.gpus != gpus:
            yield f"{node.host}: {node.gpus or 0} GPUs, and the cluster file says GPUS_PER_NODE={gpus}"
        yield from (f"{node.host}: {error}" for error in node.errors)
    for name in sorted({name for node in reports for name in node.versions}):
        versions = Counter(node.versions.get(name, "none") for node in reports)
        usual = versions.most_common(1)[0][0]
        for node in reports:
            if (version := node.versions.get(name, "none")) != usual:
                yield f"{node.host}: {name} {version}, and {versions[usual]} of {len(reports)} nodes have {usual}"


def all_reduce(store: Store, rank: int, size: int, wait: timedelta) -> float:
    """Seconds of the second of two sums over the nodes.

    Raises:
        RuntimeError: a sum that is wrong, or a node that does not take part.
    """
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(0)
    kind = "nccl" if cuda else "gloo"
    dist.init_process_group(kind, store=PrefixStore("reduce", store), rank=rank, world_size=size, timeout=wait)
    seconds = 0.0
    for _ in range(2):
        values = torch.full((1 << 20,), rank + 1.0, device="cuda" if cuda else "cpu")
        start = time.perf_counter()
        dist.all_reduce(values, async_op=True).wait(wait)
        total = values.sum().item() / values.numel()
        seconds = time.perf_counter() - start
        if total != size * (size + 1) / 2:
            raise RuntimeError(f"the all-reduce over {size} nodes gave {total}, not {size * (size + 1) / 2}")
    dist.destroy_process_group()
    return seconds


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """End this process with 1 if what is inside takes longer: the start of NCCL, in the first sum, knows no limit."""

    def give_up() -> None:
        print(f"preflight: {socket.gethostname()}: the all-reduce took over {seconds:.0f} s", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _reports(store: Store, hosts: Sequence[str], end: float) -> Iterator[Report | None]:
    for rank in range(len(hosts)):
        try:
            store.wait([f"report/{rank}"], timedelta(seconds=max(1.0, end - time.monotonic())))
        except dist.DistError:
            yield None
        else:
            yield Report(**json.loads(store.get(f"report/{rank}")))


def _silent(hosts: Sequence[str], seconds: float) -> Iterator[str]:
    yield from (f"{host}: no report within {seconds:.0f} s" for host in hosts)


def _say(node: Report) -> str:
    return ", ".join([f"{node.gpus or 0} GPUs", *(f"{name} {version}" for name, version in node.versions.items())])


def _leave(store: Store, rank: int, size: int, status: int) -> int:
    """The first keeps the store until all have read it."""
    store.set(f"left/{rank}", "")
    if rank == 0:
        for other in range(size):
            try:
                store.wait([f"left/{other}"], timedelta(seconds=10))
            except dist.DistError:
                break
    return status


if __name__ == "__main__":
    sys.exit(main())
