"""`python benchmarks/document_tables.py`: what a row of packed documents costs the host, before any layer runs.

The tables of one rank, made anew for each micro-batch: rows of 98,304 tokens with the mixes of `documents.py`, and of many
short documents, without context parallelism and on 2 and 8 ranks. Prints the least and the median of `--repeats` in
milliseconds of this thread's own time, so that other work on the machine counts as little as can be. With `--device cuda` the
host counts documents and launches the rest; on a CPU it makes the tables of tokens too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import accumulate

import torch
from documents import TOKENS, drawn, mixes

from megatron_lighthouse import LighthouseConfig
from megatron_lighthouse.lighthouse.packed.packing import Packing
from megatron_lighthouse.lighthouse.packed.shares import Shares
from megatron_lighthouse.sequence.documents import Documents
from megatron_lighthouse.sequence.layout import Layout

OF_ROW = "bounds tiles budget unit_table window_starts rows gathered_length".split()
OF_RANK = """
    align entry_at owns owners chunks_at wanted gathers_at scatters_at rows row_at own_rows own_windows
    most_windows window_places
""".split()
"""What the scorer `norm` and the steps read."""


def make(lengths: list[int], ranks: int, device: str) -> None:
    """All tables of rank 0."""
    documents = Documents(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device), tuple(lengths))
    packing = Packing.of(documents, LighthouseConfig().rule)
    made = [documents.positions, *(getattr(packing, name) for name in OF_ROW)]
    if ranks > 1 and not packing.is_whole:
        shares = Shares.of(packing, Layout(ranks, 0))
        made += [getattr(shares, name) for name in OF_RANK]
        made += [
            shares.cut.own_at,
            shares.pieces.unit_table,
            shares.pieces.window_starts,
            shares.align.slots,
            shares.align.back.slots,
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = mixes(options.tokens, []) | {"mean 100": drawn(100, options.tokens, options.tokens)}
    for name, lengths in rows.items():
        for ranks in (1, 2, 8):
            times = []
            for _ in range(options.repeats):
                start = time.thread_time()
                make(lengths, ranks, options.device)
                times.append(1e3 * (time.thread_time() - start))
                if options.device == "cuda":
                    torch.cuda.synchronize()
            spent = f"{min(times):6.1f} at least, {statistics.median(times):6.1f} in the middle"
            print(f"{name:20s} {len(lengths):6d} documents, {ranks} ranks: {spent}", flush=True)


if __name__ == "__main__":
    main()
