"""`python benchmarks/peak.py SNAPSHOT`: what a GPU held when it held most, by call site.

Of a snapshot that Megatron writes with `--record-memory-history --memory-snapshot-path SNAPSHOT` (sizes as torch allocates
them). Prints what of at least `--least` MiB was there, most first: MiB, how many, and the innermost `--frames` calls
outside torch. What is older than the record has its size alone.
"""

from __future__ import annotations

import argparse
import pickle
from collections import defaultdict
from pathlib import Path
from typing import Any

MIB = 2**20


def at_peak(snapshot: dict[str, Any], device: int = 0) -> tuple[int, list[dict[str, Any]]]:
    """Bytes at the peak within the record, and the blocks that were there, each with "size" and "frames".

    Goes back from what is there at the end, for the record may have lost its beginning.
    """
    live: dict[int, dict[str, Any]] = {}
    for segment in snapshot["segments"]:
        if segment["device"] == device:
            address = segment["address"]
            for block in segment["blocks"]:
                if block["state"].startswith("active"):
                    live[address] = block
                address += block["size"]
    made: dict[int, dict[str, Any]] = {}
    events: list[dict[str, Any]] = []
    for event in snapshot["device_traces"][device]:
        if event["action"] == "alloc":
            made[event["addr"]] = event
            events.append(event)
        elif event["action"] == "free_completed":  # by whom it was made, where the record has that
            events.append({**event, "frames": made.pop(event["addr"], {}).get("frames", [])})
    held = peak = sum(block["size"] for block in live.values())
    when = len(events)
    for place in range(len(events) - 1, -1, -1):
        held += events[place]["size"] * (-1 if events[place]["action"] == "alloc" else 1)
        if held > peak:
            peak, when = held, place
    for event in reversed(events[when:]):
        if event["action"] == "alloc":
            live.pop(event["addr"], None)
        else:
            live[event["addr"]] = event
    return peak, list(live.values())


def site(block: dict[str, Any], frames: int) -> str:
    """The innermost calls outside torch."""
    calls = [f for f in block.get("frames", []) if "/torch/" not in f["filename"] and f["filename"].endswith(".py")]
    return " < ".join(f"{Path(f['filename']).stem}.{f['name']}:{f['line']}" for f in calls[:frames]) or "?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("snapshot", type=Path)
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--least", type=float, default=32, metavar="MIB")
    options = parser.parse_args()
    with options.snapshot.open("rb") as file:
        peak, blocks = at_peak(pickle.load(file))
    print(f"{peak / MIB:,.0f} MiB at the peak")
    sites: defaultdict[tuple[str, int], int] = defaultdict(int)
    for block in blocks:
        sites[site(block, options.frames), block["size"]] += 1
    small = 0
    for (name, size), count in sorted(sites.items(), key=lambda x: -x[0][1] * x[1]):
        if count * size >= options.least * MIB:
            print(f"{count * size / MIB:10,.1f} MiB  {count:4} x {size / MIB:10,.2f}  {name}")
        else:
            small += count * size
    print(f"{small / MIB:10,.1f} MiB  smaller")


if __name__ == "__main__":
    main()
