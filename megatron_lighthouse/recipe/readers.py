"""How text becomes tokens: bytes, or what the run's tokenizer makes of it. Imports no Megatron."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from megatron_lighthouse.mcore.data import plain, text

type Array = numpy.ndarray[Any, Any]


@dataclass(frozen=True)
class Reader:
    """Text as a model reads it."""

    unit: str
    """What a token is: 'byte' or 'token'."""
    encode: Callable[[str], Array]
    """A piece of text -> [n] tokens, with none added before or after it."""
    document: Callable[[bytes], Array]
    """A file -> [n] tokens, as it is in training data: that of the end of a document last, where there is such."""
    end: int | None
    """The token of the end of a document."""

    def read(self, paths: Sequence[str]) -> tuple[list[Path], Array]:
        """The files, and their tokens, one document after the other.

        Raises:
            ValueError: a path that does not exist, or no plain text.
        """
        try:
            files = text.text_files(paths)
        except ValueError as error:
            raise ValueError(str(error).replace("--text-data", "--held-out")) from None
        if found := [*plain.problems("--held-out", map(Path, paths))]:
            raise ValueError("\n".join(found))
        return files, numpy.concatenate([self.document(file.read_bytes()) for file in files])


def _bytes(content: bytes) -> Array:
    return numpy.frombuffer(content, dtype=numpy.uint8).astype(numpy.uint16)


BYTES = Reader(
    "byte",
    lambda words: _bytes(words.encode()),
    lambda content: numpy.append(_bytes(content), numpy.uint16(text.END_OF_DOCUMENT)),
    text.END_OF_DOCUMENT,
)
"""Of --text-data."""


def reader_of(tokenizer: Any, kind: str) -> Reader:
    """What a tokenizer of Megatron makes of text.

    Args:
        kind: --tokenizer-type, for errors.

    Raises:
        ValueError: one that reads no text.
    """
    if kind.startswith("Null"):
        raise ValueError(
            f"--tokenizer-type {kind} reads no text, and the run had no --text-data: give the tokenizer that made its data."
        )
    end, begin = _id(tokenizer, "eod"), _id(tokenizer, "bos")

    def encode(words: str) -> Array:
        found = [int(token) for token in tokenizer.tokenize(words)]
        while found and found[0] == begin:
            del found[0]
        while found and found[-1] == end:
            del found[-1]
        return numpy.array(found, dtype=numpy.int64)

    def document(content: bytes) -> Array:
        found = [int(token) for token in tokenizer.tokenize(content.decode(errors="replace"))]
        found += [end] if end is not None and found[-1:] != [end] else []
        return numpy.array(found, dtype=numpy.int64)

    return Reader("token", encode, document, end)


def _id(tokenizer: Any, name: str) -> int | None:
    """Of a token that not every tokenizer has."""
    try:
        found = getattr(tokenizer, name)
    except (AttributeError, NotImplementedError, KeyError, TypeError):
        return None
    return found if isinstance(found, int) else None
