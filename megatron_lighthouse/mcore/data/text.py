"""Plain text as training data: one byte, one token. Imports only the Megatron that writes indexed datasets."""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy

from megatron_lighthouse.mcore.data.write import write_dataset

VOCABULARY = 257
"""256 bytes, and an end-of-document token."""
END_OF_DOCUMENT = 256
PADDED_VOCABULARY = 384
"""Rows of the embedding: divides by any usual tensor-parallel size. Megatron's own padding grows with that size, and so
does the loss, which counts the padding."""
HELD_OUT = 20
"""One byte in so many is kept for validation."""
SMALLEST = 1000
"""Bytes of text below which there is nothing to learn."""
SUFFIXES = {".txt", ".md", ".rst", ".py", ".tex", ".html", ".json", ".jsonl", ".csv", ".c", ".h", ".cpp", ".cu", ".xml"}


class TextData(argparse.Action):
    """`--text-data`: also chooses the tokenizer, before Megatron looks at it."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        if values is None:  # of a flag without its value, which the parser has kept
            return
        # the checkpoint keeps these, and an evaluation anywhere has to know by them what was read
        namespace.text_data = [str(Path(path).resolve()) for path in values]
        use_bytes(namespace)


def use_bytes(args: argparse.Namespace) -> None:
    """Make the tokenizer of Megatron's arguments that of bytes."""
    args.tokenizer_type, args.vocab_size = "NullTokenizer", VOCABULARY
    args.padded_vocab_size, args.null_tokenizer_eod_id = PADDED_VOCABULARY, END_OF_DOCUMENT


def reads_bytes(args: argparse.Namespace) -> bool:
    """Whether tokens are bytes."""
    return args.tokenizer_type == "NullTokenizer" and getattr(args, "null_tokenizer_eod_id", None) == END_OF_DOCUMENT


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--text-data` to Megatron's parser."""
    group = parser.add_argument_group("text data")
    group.add_argument(
        "--text-data",
        nargs="+",
        action=TextData,
        metavar="PATH",
        help="Plain text files, or folders of them, as training data: one byte is one token, one file one document. Sets "
        "the tokenizer, so takes the place of --data-path and --tokenizer-type.",
    )
    return parser


def text_files(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The text files named, and those in the folders named, in a fixed order.

    Raises:
        ValueError: a path that does not exist or cannot be read, or no text in any of them.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found += sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES and f.is_file())
        elif path.is_file():
            found.append(path)
        else:
            raise ValueError(f"--text-data {path} does not exist: give text files, or folders that hold them.")
    found = [f for f in found if f.stat().st_size]
    if not found:
        names = " ".join(map(str, paths))
        raise ValueError(f"--text-data {names} holds no text: give text files, or folders with {' '.join(sorted(SUFFIXES))}.")
    if closed := [f for f in found if not os.access(f, os.R_OK)]:
        raise ValueError(f"--text-data {closed[0]} cannot be read: give files that all nodes may read.")
    return found


def training_files(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Those, where they are enough to learn from.

    Raises:
        ValueError: as `text_files`, or too little text.
    """
    files = text_files(paths)
    if (total := sum(f.stat().st_size for f in files)) < SMALLEST:
        raise ValueError(f"--text-data holds {total} bytes of text: give at least {SMALLEST}.")
    return files


def write_datasets(paths: Sequence[str], folder: str) -> tuple[str, str]:
    """Write the text as two Megatron indexed datasets, unless they are there already.

    The split is by bytes, not by documents as Megatron's `--split` is: one file is enough.

    Returns:
        The prefixes for training and for validation, the last twentieth of the text. The names come from the files'
        names, sizes and times.

    Raises:
        ValueError: as `training_files`.
    """
    files = training_files(paths)
    names, total = names_of(files, folder), sum(file.stat().st_size for file in files)
    if not all(os.path.exists(f"{name}.idx") for name in names):
        os.makedirs(folder, exist_ok=True)
        held_out = total // HELD_OUT
        for name, start, stop in ((names[0], 0, total - held_out), (names[1], total - held_out, total)):
            write_dataset(name, map(_tokens, _documents(files, start, stop)), numpy.uint16)
    return names


def names_of(files: Iterable[Path], folder: str) -> tuple[str, str]:
    """The prefixes that `write_datasets` gives."""
    key = hashlib.sha256()
    for file in files:
        status = file.stat()
        key.update(f"{file.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    train, valid = (os.path.join(folder, f"text-{key.hexdigest()[:16]}-{part}") for part in ("train", "valid"))
    return train, valid


def _documents(files: Iterable[Path], start: int, stop: int) -> Iterator[bytes]:
    """The bytes from `start` to `stop` of all files put end to end, a piece a file."""
    position = 0
    for file in files:
        size = file.stat().st_size
        if position < stop and position + size > start:
            yield file.read_bytes()[max(0, start - position) : stop - position]
        position += size


def _tokens(document: bytes) -> numpy.ndarray[Any, Any]:
    return numpy.append(numpy.frombuffer(document, dtype=numpy.uint8).astype(numpy.uint16), END_OF_DOCUMENT)


def tokens_of(prefix: str) -> int:
    """How many a written dataset has."""
    return os.path.getsize(f"{prefix}.bin") // numpy.dtype(numpy.uint16).itemsize


def byte_entropy(prefix: str) -> float:
    """Entropy, in nats a token, of a written dataset's token frequencies: what a model that reads no context reaches."""
    tokens = numpy.memmap(f"{prefix}.bin", dtype=numpy.uint16, mode="r")
    counts = numpy.bincount(tokens, minlength=VOCABULARY)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * numpy.log(share)).sum())
