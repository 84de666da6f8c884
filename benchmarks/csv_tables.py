"""Tables that the benchmarks leave."""

from __future__ import annotations

import csv
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path


def write_csv(path: Path, rows: Sequence[Mapping[str, object]], leave_out: Collection[str] = ()) -> None:
    """Rows with all columns that any of them has, in the order in which they come up."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in leave_out]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
