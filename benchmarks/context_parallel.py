"""`python benchmarks/context_parallel.py --out FOLDER`: checks and times context parallelism over the GPUs of one machine.

One process a GPU, over NCCL. `--part check`: the layer on all ranks against one rank, on fresh random inputs: selection, output
and gradients, by each scheme and inner attention, Transformer Engine's too where it is installed; and whether results repeat to
the bit. `--part time`: one rank against all ranks on the same total of tokens, Lighthouse and dense, by scheme, with the share
of communication; `--ranks` takes fewer GPUs than there are. Leaves a CSV, a JSON summary and a picture. The selection is the
same to the last bit, or the run fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from context_parallel_checks import check
from context_parallel_layers import world
from context_parallel_times import CASES, TIMED, time_case
from csv_tables import write_csv
from torch.multiprocessing.spawn import spawn

from megatron_lighthouse.lighthouse.scorers import SCORERS
from megatron_lighthouse.versions import environment

RANKS = (2, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "context_parallel")
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count(), help="GPUs to use (default: all)")
    parser.add_argument("--part", choices=["check", "time"], nargs="+", default=["check", "time"])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(TIMED), help="lengths to time")
    parser.add_argument("--scorers", nargs="+", default=list(SCORERS), choices=list(SCORERS), help="whose selection to compare")
    parser.add_argument("--low-priority", action="store_true", help="NCCL on a stream of no higher priority, as by default")
    parser.add_argument("--quick", action="store_true", help="p2p and cuDNN alone")
    options = parser.parse_args()
    if options.ranks not in RANKS or options.ranks > torch.cuda.device_count():
        seen = torch.cuda.device_count()
        parser.error(
            f"--ranks {options.ranks} must be one of {RANKS}, whose sizes the cases fit, of the {seen} GPUs that are visible."
        )
    options.out.mkdir(parents=True, exist_ok=True)
    store = tempfile.mkdtemp()
    one_cudnn()
    spawn(_rank, args=(options, store), nprocs=options.ranks)


def one_cudnn() -> None:
    """Let Transformer Engine load the cuDNN that torch brings, not the system's: two do not work in one process."""
    found = importlib.util.find_spec("nvidia.cudnn")
    if found is not None and found.submodule_search_locations:
        home = found.submodule_search_locations[0]
        os.environ |= {"CUDNN_HOME": home, "LD_LIBRARY_PATH": f"{home}/lib:{os.environ.get('LD_LIBRARY_PATH', '')}"}


def _rank(rank: int, options: argparse.Namespace, store: str) -> None:
    torch.cuda.set_device(rank)
    where = f"file://{store}/store"
    device = torch.device("cuda", rank)
    # as Megatron's --high-priority-stream-groups cp: what is sent need not wait for a kernel that fills the GPU
    urgent = dist.ProcessGroupNCCL.Options(is_high_priority_stream=not options.low_priority)
    meet: dict[str, Any] = {"init_method": where, "rank": rank, "world_size": options.ranks, "timeout": timedelta(minutes=2)}
    dist.init_process_group("nccl", device_id=device, pg_options=urgent, **meet)
    results: dict[str, Any] = {**environment(), "ranks": options.ranks}
    torch.manual_seed(1)
    if "check" in options.part:
        path = options.out / "checks.json"
        check(world(), options.scorers, lambda found: _write(rank, path, {**results, "checks": found}))
    if "time" in options.part:
        rows: list[dict[str, Any]] = []
        for name in options.cases:
            rows += time_case(name, world(), options.quick, options.out)
            if rank == 0:
                write_csv(options.out / "times.csv", rows)
        if rank == 0:
            from context_parallel_plots import draw

            _write(rank, options.out / "times.json", {**environment(), "ranks": options.ranks})
            draw(options.out / "times.png", rows, options.ranks)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # Transformer Engine's atexit hooks can outlive the process group


def _write(rank: int, path: Path, results: dict[str, Any]) -> None:
    if rank == 0:
        path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
