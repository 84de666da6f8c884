"""Files of conversations, a row of them a line of JSON, as Megatron's `--sft` reads them. Imports no Megatron."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

USE = 'give JSON lines such as {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}.'


class Conversations:
    """The `messages` of each line of a file that holds something: as Megatron's low-level dataset, without a package for it."""

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self.starts: list[int] = []
        """Bytes before each such line."""
        start = 0
        with open(path, "rb") as file:
            for line in file:
                if not line.isspace():
                    self.starts.append(start)
                start += len(line)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        """Opens the file anew: workers of a data loader are forked, and would move each other's place in it."""
        with open(self.path, "rb") as file:
            file.seek(self.starts[index])
            messages: list[dict[str, Any]] = json.loads(file.readline())["messages"]
            return messages


def problem(name: str, path: str, file: Path, whole: bool) -> str | None:
    """Why a file holds no conversations.

    Args:
        name: of the option that gives `path`; `file`: where that is on this machine.
        whole: whether to look into all lines; else into the first alone.
    """
    try:
        with file.open("rb") as lines:
            found = 0
            for number, line in enumerate(lines, 1):
                if line.isspace():
                    continue
                found += 1
                if wrong := _wrong(line):
                    return f"{name} {path}, line {number}: {wrong}: {USE}"
                if not whole:
                    break
    except OSError as error:
        return f"{name} {path} cannot be read ({error.strerror}): {USE}"
    return None if found else f"{name} {path} is empty: {USE}"


def _wrong(line: bytes) -> str | None:
    """What a line lacks that the dataset reads of it."""
    try:
        row = json.loads(line)
    except ValueError as error:
        return f"no JSON ({error})"
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        return "no list of messages"
    if not all(isinstance(x, dict) and isinstance(x.get("role"), str) and isinstance(x.get("content"), str) for x in messages):
        return "a message without role or content"
    return None
