"""Whether files are plain text: neither JSON lines, whose syntax would be learnt too, nor bytes that are no text. Ours."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path

from megatron_lighthouse.mcore.data.text import text_files

LINES = (".jsonl", ".ndjson")
"""How the name of a file ends that has a JSON object a line, whatever the lines say."""
START = 2**16
"""Bytes of a file that are looked at."""
NAMED = 3
"""Files of which the same is said, named at most."""


def problems(name: str, paths: Iterable[Path]) -> Iterator[str]:
    """What is wrong with the files behind an option that takes plain text, each in a sentence.

    Of a folder, which may hold a program's data beside its sources, nothing is unless all files are.
    """
    lines: list[Path] = []
    others: list[Path] = []
    for path in paths:
        files = text_files([path]) if path.is_dir() else [path]
        kinds = [*takewhile(bool, map(_kind, files))]  # the first text settles a folder: no more of it is read
        if len(kinds) == len(files):
            for file, kind in zip(files, kinds, strict=True):
                (lines if kind == "lines" else others).append(file)
    if lines:
        yield (
            f"{name} {named(lines)}: JSON lines, whose braces and keys would be read as text. Give their texts alone; to "
            "train on them, `python -m megatron_lighthouse.mcore.data.prepare` makes a dataset of them for --data-path."
        )
    if others:
        prefixes = [str(file.with_suffix("")) for file in others if file.with_suffix(".idx").is_file()]
        dataset = f" (of an indexed dataset: --data-path {prefixes[0]} reads it, with its tokenizer)" if prefixes else ""
        yield f"{name} {named(others)}: no plain text, for it has bytes of 0{dataset}. Give text in UTF-8, not packed."


def _kind(file: Path) -> str | None:
    """What a file is in place of plain text."""
    with file.open("rb") as opened:
        start = opened.read(START)
    return "bytes" if b"\0" in start else "lines" if are_json_lines(file.name, start) else None


def are_json_lines(name: str, start: bytes) -> bool:
    """Whether a file of this name that begins with these bytes has a JSON object a line.

    One by another name has if its first two lines say so: a single one may be a program's settings.
    """
    first = [line for line in start.split(b"\n") if line.strip()][:2]
    whole = len(start) < START or start.count(b"\n") > 1  # else the second line is cut
    second = len(first) == 2 and (_is_object(first[1]) if whole else first[1].lstrip().startswith(b'{"'))
    return name.endswith(LINES) or (second and _is_object(first[0]))


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(found := json.loads(line), dict) and bool(found)
    except ValueError:
        return False


def named(files: Sequence[Path | str]) -> str:
    """The first few of files."""
    more = f" and {len(files) - NAMED} more" if len(files) > NAMED else ""
    return ", ".join(map(str, files[:NAMED])) + more
