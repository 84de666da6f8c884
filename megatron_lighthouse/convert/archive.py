"""Tensors that `torch.save` wrote one after the other into a file, as views of the mapped file: nothing is read or copied."""

from __future__ import annotations

import io
import mmap
import zipfile
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

LOCAL_HEADER = 30
"""Bytes before the name in front of an entry of a zip file (PKWARE's APPNOTE, section 4.3.7)."""


class Mapped:
    """A file, mapped."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # torch warns of memory that it may not write to
        self._map.madvise(mmap.MADV_SEQUENTIAL)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def tensor(self, offset: int, length: int) -> Tensor:
        """The tensor that `torch.save` wrote to this part of the file.

        Raises:
            ValueError: there is none, or one that is not stored as it is in memory.
        """
        start = offset + self._data(offset, length)
        form = torch.load(cast(IO[bytes], _Slice(self._map, offset, length)), map_location="meta", weights_only=True)
        if not isinstance(form, Tensor):
            raise ValueError(f"it holds a {type(form).__name__}, where a tensor should be.")
        data = self._bytes.untyped_storage()[start : start + form.untyped_storage().nbytes()]
        return torch.empty(0, dtype=form.dtype).set_(data, form.storage_offset(), form.size(), form.stride())

    def _data(self, offset: int, length: int) -> int:
        """Where the bytes of its storage begin, counted from the part's begin."""
        try:
            with zipfile.ZipFile(_Slice(self._map, offset, length)) as archive:
                (entry,) = (entry for entry in archive.infolist() if entry.filename.endswith("/data/0"))
        except (zipfile.BadZipFile, ValueError) as error:
            raise ValueError(f"it holds no archive of one tensor ({error}).") from error
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError("its tensor is compressed, and is not read.")
        begin = offset + entry.header_offset
        header = self._map[begin : begin + LOCAL_HEADER]
        name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        return entry.header_offset + LOCAL_HEADER + name + extra


class _Slice(io.RawIOBase):
    """A part of a mapped file, as a file."""

    def __init__(self, mapped: mmap.mmap, offset: int, length: int) -> None:
        self._map, self._offset, self._length, self._at = mapped, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, to: int, whence: int = io.SEEK_SET) -> int:
        self._at = to + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def readinto(self, target: Any) -> int:
        count = max(min(len(target), self._length - self._at), 0)
        start = self._offset + self._at
        target[:count] = self._map[start : start + count]
        self._at += count
        return count
