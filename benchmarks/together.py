"""Tables that are drawn together: of one device, and one point where a length was measured several times."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path


def check_one_device(tables: Sequence[Path]) -> None:
    """Refuse to draw tables of different devices as one. The device is in the JSON beside a table, where there is one.

    Raises:
        SystemExit: the tables of each device.
    """
    devices: dict[str, list[str]] = {}
    for table in tables:
        facts = table.with_suffix(".json")
        if facts.is_file() and (device := json.loads(facts.read_text()).get("device")):
            devices.setdefault(device, []).append(str(table))
    if len(devices) > 1:
        lines = [f"{device}: {' '.join(names)}" for device, names in devices.items()]
        raise SystemExit("These are of different devices, which cannot be compared: draw each alone.\n  " + "\n  ".join(lines))


def medians(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points in order, those of one x as their median."""
    found: dict[float, list[float]] = {}
    for x, y in points:
        found.setdefault(x, []).append(y)
    return [(x, statistics.median(found[x])) for x in sorted(found)]
