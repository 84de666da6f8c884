"""Whether files are plain text: neither JSON lines, whose syntax would be learnt too, nor bytes that are no text. Ours."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

LINES = (".jsonl", ".ndjson")
"""How the name of a file ends that has a JSON object a line, whatever the lines say."""
START = 2**16
"""Bytes of a file that are looked at."""
NAMED = 3
"""Files of which the same is said, named at most."""


def problems(name: str, files: Iterable[Path]) -> Iterator[str]:
    """What is wrong with the files behind an option that takes plain text, each in a sentence."""
    lines, others = [], []
    for file in files:
        with file.open("rb") as opened:
            start = opened.read(START)
        if b"\0" in start:
            others.append(file)
        elif are_json_lines(file.name, start):
            lines.append(file)
    if lines:
        yield (
            f"{name} {named(lines)}: JSON lines, whose braces and keys would be read as text. Give their texts alone; to "
            "train on them, `python -m megatron_lighthouse.mcore.data.prepare` makes a dataset of them for --data-path."
        )
    if others:
        prefixes = [str(file.with_suffix("")) for file in others if file.with_suffix(".idx").is_file()]
        dataset = f" (of an indexed dataset: --data-path {prefixes[0]} reads it, with its tokenizer)" if prefixes else ""
        yield f"{name} {named(others)}: no plain text, for it has bytes of 0{dataset}. Give text in UTF-8, not packed."


def are_json_lines(name: str, start: bytes) -> bool:
    """Whether a file of this name that begins with these bytes has a JSON object a line.

    One by another name has if its first two lines say so: a single one may be a program's settings.
    """
    first = [line for line in start.split(b"\n", 8) if line.strip()][:2]
    return name.endswith(LINES) or (len(first) == 2 and _is_object(first[0]) and first[1].lstrip().startswith(b'{"'))


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def named(files: Sequence[Path | str]) -> str:
    """The first few of files."""
    more = f" and {len(files) - NAMED} more" if len(files) > NAMED else ""
    return ", ".join(map(str, files[:NAMED])) + more
