"""Numbers as people write them: 20B tokens, a length of 512K."""

from __future__ import annotations

import argparse
import re

THOUSANDS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
LENGTHS = {"": 1, "K": 2**10, "M": 2**20}
"""Of a sequence, by powers of two: 512K are 524,288."""


def tokens(text: str) -> float:
    """A number of tokens: 20B, 1.5T, 10e9 or 10,000,000,000."""
    number, unit = _read(text, THOUSANDS, "20B, 1.5T or 10e9")
    return number * THOUSANDS[unit]


def length(text: str) -> int:
    """A sequence length: 512K, 1M or 98304."""
    number, unit = _read(text, LENGTHS, "512K, 1M or 98304")
    if (found := number * LENGTHS[unit]) != round(found):
        raise argparse.ArgumentTypeError(f"{text} is no whole number of tokens: use {round(found)}")
    return round(found)


def _read(text: str, units: dict[str, int], such: str) -> tuple[float, str]:
    match = re.fullmatch(rf"(.+?)\s*([{''.join(units)}]?)", text.strip().replace(",", ""), flags=re.IGNORECASE)
    try:
        return float(match[1]), match[2].upper()  # type: ignore[index]
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is no number: use one such as {such}") from None
