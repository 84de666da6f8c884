"""Folders of a conversion: checked before, written beside the target under another name, and renamed when whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

CARRIED = "hf"
"""The folder within a Megatron folder that keeps config.json, tokenizer and what else is no weight."""
NO_TENSORS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json", ".distcp")
MARGIN = 64 << 20
"""Bytes of room that a conversion wants beside its tensors: headers, tokenizer, file system."""
UNFINISHED, REPLACED = ".convert-unfinished", ".convert-replaced"


def check_apart(source: Path, target: Path) -> None:
    """Raises ValueError where one folder is within the other, or the same."""
    one, other = source.resolve(), target.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise ValueError(f"{target} and {source} are one within the other: name another folder.")


def check_target(folder: Path, force: bool, needed: int, marks: Sequence[str]) -> None:
    """Refuse a folder that is not empty, and a disk that is too full.

    Args:
        needed: bytes of the tensors.
        marks: files of which one must be in a folder that --force may replace.

    Raises:
        ValueError: either of them, or a place that cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: name a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise ValueError(f"{folder} is not empty: name another folder, or replace what is in it with --force.")
    if folder.is_dir() and any(folder.iterdir()) and not any((folder / name).is_file() for name in marks):
        raise ValueError(
            f"{folder} is no folder of this kind ({marks[0]} is not in it), which --force would replace: name another."
        )
    above = folder.resolve().parent
    while not above.exists():
        above = above.parent
    if not os.access(above, os.W_OK):
        raise ValueError(f"{folder} cannot be written: {above} permits it not.")
    free = shutil.disk_usage(above).free
    if free < needed + MARGIN:
        raise ValueError(
            f"{folder} needs {(needed + MARGIN) / 1e9:.2f} GB, and {above} has {free / 1e9:.2f} GB free: name another disk. "
            "(What --force replaces is removed only when the new files are whole.)"
        )


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new empty folder beside `folder`, which takes its name when the block ends, and is removed if it fails.

    What is killed leaves a folder whose name ends in UNFINISHED, which the next start removes.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(folder.name + UNFINISHED)
    old = folder.with_name(folder.name + REPLACED)
    for rest in (beside, old):
        shutil.rmtree(rest, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        for path in beside.rglob("*"):  # at the end, for the disk then writes while tensors are read
            _settle(path)
        if folder.exists():
            folder.rename(old)
        beside.rename(folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _settle(path: Path) -> None:
    """Wait until a file, or what a folder lists, is on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def carry(source: Path, target: Path) -> list[str]:
    """Copy all files of `source` that hold no tensors; their names."""
    target.mkdir(exist_ok=True)
    names = []
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.endswith(NO_TENSORS) and not file.name.startswith("."):
            shutil.copyfile(file, target / file.name)
            names.append(file.name)
    return names
