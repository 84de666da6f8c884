"""The two files of an indexed dataset: what is wrong with them, and whether they changed. Imports no Megatron."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
"""Of an .idx: the magic bytes, version 1, the code of the tokens' dtype, sequences, and documents + 1."""
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
"""Of a token, by the code in an .idx."""
PLACES, TOKENS = 16, 2**16
"""Where a .bin is looked at for the tokens in it, and how many there, where it has more."""
WHOLE = 2**24
"""Bytes of an .idx up to which it is read whole: beyond, its header, its ends and its size must do."""


@dataclass(frozen=True)
class Header:
    """What the first bytes of an .idx say."""

    dtype: numpy.dtype[Any]
    """Of a token."""
    sequences: int
    documents: int
    """With the end of the last, so one more than there are."""

    @property
    def lengths(self) -> int:
        """Where the int32 lengths of the sequences begin; int64 offsets into the .bin follow, then the documents' ends."""
        return HEADER.size

    @property
    def offsets(self) -> int:
        """Where the offsets begin."""
        return self.lengths + 4 * self.sequences

    @property
    def ends(self) -> int:
        """Where the documents' ends begin."""
        return self.offsets + 8 * self.sequences

    @property
    def size(self) -> int:
        """The least bytes of such a file."""
        return self.ends + 8 * self.documents


def read_header(idx: Path) -> Header:
    """The header of an .idx, whose size it is held to.

    Raises:
        ValueError: it is no index, or cut off; without the file's name.
        OSError: it cannot be read.
    """
    with idx.open("rb") as file:
        start = file.read(HEADER.size)
    size = idx.stat().st_size
    if len(start) < HEADER.size:
        raise ValueError(f"has {size} bytes, which are no index")
    magic, version, code, sequences, documents = HEADER.unpack(start)
    if magic != MAGIC:
        raise ValueError(f"begins with {magic!r} where an index begins with {MAGIC!r}")
    if version != 1 or code not in DTYPES:
        raise ValueError(f"says version {version} and dtype {code}: known are version 1 and dtypes 1 to {max(DTYPES)}")
    header = Header(numpy.dtype(DTYPES[code]), sequences, documents)
    if size < header.size:
        raise ValueError(f"has {size:,} bytes, and {sequences:,} sequences in {documents - 1:,} documents take {header.size:,}")
    return header


def problem(idx: Path, data: Path, whole: bool = True) -> str | None:
    """Why these two files are no dataset, beginning with ".idx" or ".bin"; None where they are one.

    Args:
        whole: whether to read all lengths and offsets of an .idx of up to WHOLE bytes, not its last ones alone.
    """
    suffix = ".idx"
    try:
        header = read_header(idx)
        if not header.sequences or not header.documents:
            return ".idx counts no sequence, as of files that hold no text"
        ends = _numbers(idx, "<i8", header.ends, header.documents, whole)
        if ends[-1] != header.sequences:
            return f".idx counts {header.sequences:,} sequences, and its last document ends with sequence {ends[-1]:,}"
        lengths = _numbers(idx, "<i4", header.lengths, header.sequences, whole)
        offsets = _numbers(idx, "<i8", header.offsets, header.sequences, whole)
        if min(lengths.min(), offsets.min()) < 0:
            return ".idx has a negative length or offset"
        end = int((offsets + header.dtype.itemsize * lengths.astype(numpy.int64)).max())
        suffix = ".bin"
        with data.open("rb") as file:
            size = file.seek(0, 2)
    except (OSError, ValueError) as error:
        return f"{suffix} {error if isinstance(error, ValueError) else f'cannot be read ({error.strerror})'}"
    if not end or not size:
        return ".bin holds no token"
    return f".bin has {size:,} bytes, and its .idx says {end:,}" if size < end else None


def ids(idx: Path, data: Path) -> tuple[int, int]:
    """The least and the greatest token of a dataset that is whole: of all, or of what stands in PLACES of a greater .bin.

    Raises:
        OSError: it cannot be read.
    """
    dtype = read_header(idx).dtype
    tokens = numpy.memmap(data, dtype, "r", shape=(data.stat().st_size // dtype.itemsize,))
    last = max(0, len(tokens) - TOKENS)
    starts = range(0, len(tokens), TOKENS) if last <= PLACES * TOKENS else [last * n // (PLACES - 1) for n in range(PLACES)]
    found = [tokens[start : start + TOKENS] for start in starts]
    return int(min(part.min() for part in found)), int(max(part.max() for part in found))


def _numbers(idx: Path, dtype: str, start: int, count: int, whole: bool) -> numpy.ndarray[tuple[int], numpy.dtype[numpy.int64]]:
    """All of a part of the index, or its last."""
    skipped = 0 if whole and idx.stat().st_size <= WHOLE else count - 1
    return numpy.fromfile(idx, dtype, count - skipped, offset=start + skipped * numpy.dtype(dtype).itemsize)


def fingerprint(idx: Path) -> str:
    """Another wherever the lengths that Megatron's cached order was built from are others.

    The hash of an .idx of up to WHOLE bytes. Of a greater one that of its size, its time, and as many bytes, from both ends.
    """
    status = idx.stat()
    key = hashlib.sha256()
    with idx.open("rb") as file:
        if status.st_size > WHOLE:
            key.update(f"{status.st_size} {status.st_mtime_ns}".encode() + file.read(WHOLE // 2))
            file.seek(-WHOLE // 2, 2)
        key.update(file.read())
    return key.hexdigest()
