"""Folders of safetensors: read tensor by tensor, and written byte by byte, so that no file is ever whole in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NAMES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"},
}
"""The format's own names (https://github.com/huggingface/safetensors, README)."""
DTYPES = {name: dtype for dtype, name in NAMES.items()}


@dataclass(frozen=True)
class Stored:
    """What a file says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Safetensors:
    """The tensors of a Hugging Face folder. Files are mapped, and read when asked for.

    Raises:
        ValueError: no tensors, both a single file and an index, an index that names absent files or tensors, a cut file.
    """

    def __init__(self, folder: Path) -> None:
        safe_open = _library()
        self._where: dict[str, Any] = {}
        for file, named in _files(folder).items():
            try:
                opened = safe_open(file, framework="pt")
            except Exception as error:  # the library's own class, which is not exported everywhere
                raise ValueError(f"{file} is cut or no safetensors file ({error}): copy it again.") from error
            there = set(opened.keys())
            if missing := sorted(named - there):
                raise ValueError(f"{folder / INDEX} says that {missing[0]} is in {file.name}, and it is not: copy both again.")
            self._where |= dict.fromkeys(named or there, opened)
        self.stored: Mapping[str, Stored] = {name: self._stored(name) for name in self._where}

    def read(self, name: str, index: int | None = None) -> Tensor:
        """The tensor, or the part of it at `index` of its first axis; a view of the mapped file."""
        part = self._where[name].get_slice(name)
        return part[:] if index is None else part[index]

    def _stored(self, name: str) -> Stored:
        part = self._where[name].get_slice(name)
        dtype = DTYPES.get(part.get_dtype())
        if dtype is None:
            raise ValueError(f"{name} is of dtype {part.get_dtype()}: {', '.join(DTYPES)} can be read.")
        return Stored(tuple(part.get_shape()), dtype)


def _files(folder: Path) -> dict[Path, set[str]]:
    """The files to read, and which tensors the index says they hold; none said: all."""
    single, index = folder / SINGLE, folder / INDEX
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: name one with config.json and {SINGLE} or {INDEX}.")
    if single.exists() and index.exists():
        raise ValueError(
            f"{folder} holds both {SINGLE} and {INDEX}, of which transformers reads the first: remove one of them."
        )
    if single.exists():
        return {single: set()}
    if not index.exists():
        raise ValueError(f"{folder} holds neither {SINGLE} nor {INDEX}: other formats are not read.")
    try:
        named: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{index} is no index of safetensors files ({error!r}): copy it again.") from error
    if absent := sorted({name for name in named.values() if not (folder / name).is_file()}):
        raise ValueError(f"{index} names {len(absent)} files that are not there, {absent[0]} first: copy them too.")
    return {folder / file: {name for name, where in named.items() if where == file} for file in dict.fromkeys(named.values())}


def _library() -> Callable[..., Any]:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ValueError("safetensors is not installed: pip install 'megatron_lighthouse[hf]'.") from error
    return safe_open


@dataclass(frozen=True)
class Tensors:
    """A tensor to be written: its data is asked for when its turn comes."""

    name: str
    stored: Stored
    read: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return torch.Size(self.stored.shape).numel() * self.stored.dtype.itemsize


def write(folder: Path, tensors: Sequence[Tensors], shard_bytes: int, wrote: Callable[[int], object]) -> None:
    """Files of at most `shard_bytes` (but for a single tensor that is greater), and their index where there are several.

    Args:
        wrote: called with the bytes of each tensor, once written.
    """
    shards = [*_shards(tensors, shard_bytes)]
    names = (
        [SINGLE] if len(shards) == 1 else [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    )
    for file, shard in zip(names, shards, strict=True):
        _write_file(folder / file, shard, wrote)
    if len(shards) > 1:
        where = {tensor.name: file for file, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": sum(t.bytes for t in tensors)}, "weight_map": dict(sorted(where.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shards(tensors: Sequence[Tensors], most: int) -> Iterator[list[Tensors]]:
    shard: list[Tensors] = []
    for tensor in tensors:
        if shard and sum(t.bytes for t in shard) + tensor.bytes > most:
            yield shard
            shard = []
        shard.append(tensor)
    yield shard


def _write_file(path: Path, tensors: Sequence[Tensors], wrote: Callable[[int], object]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.bytes
        header[tensor.name] = {
            **{"dtype": NAMES[tensor.stored.dtype], "shape": [*tensor.stored.shape]},
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            data = tensor.read().contiguous()
            if (data.shape, data.dtype) != (tensor.stored.shape, tensor.stored.dtype):
                raise ValueError(f"{tensor.name} turned out {tuple(data.shape)} {data.dtype}, not as announced.")
            file.write(memoryview(data.reshape(-1).view(torch.uint8).numpy()))
            wrote(tensor.bytes)
