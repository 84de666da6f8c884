"""The tensors of a checkpoint of Megatron's `torch_dist` format, of any layout, read part by part from mapped files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata

from megatron_lighthouse.convert.archive import Mapped
from megatron_lighthouse.convert.memory import Reused
from megatron_lighthouse.convert.torch_dist import EXTRA
from megatron_lighthouse.mcore.command_line.stored import read_metadata

NOT_WEIGHTS = ("optimizer", "rng_state", "rerun_state_machine_state", "common_state", "opt_param_scheduler", "content_metadata")
"""What the names of a run's other state begin with."""


class TorchDist:
    """The tensors of a `torch_dist` checkpoint of any layout, read part by part.

    Args:
        rename: gives the name by which a tensor is asked for.

    Raises:
        ValueError: another format, one of a newer torch, a file that is missing or cut, or a tensor with a gap.
    """

    def __init__(self, folder: Path, rename: Callable[[str], str] = str) -> None:
        self.folder = folder
        if not (folder / ".metadata").is_file():
            raise ValueError(
                f"{folder} holds no .metadata: it is no checkpoint of --ckpt-format torch_dist, or an unfinished one."
            )
        metadata = read_metadata(folder)
        self._where: dict[tuple[str, torch.Size | None], Any] = {
            (rename(i.fqn), i.offset): at for i, at in metadata.storage_data.items()
        }
        self._mapped = cache(lambda name: Mapped(folder / name))
        self._memory = Reused()
        self.tensors: dict[str, TensorStorageMetadata] = {
            rename(key): found
            for key, found in metadata.state_dict_metadata.items()
            if isinstance(found, TensorStorageMetadata)
        }
        self._check_files(metadata.storage_data)

    def weights(self) -> list[str]:
        """Names of the model's own tensors."""
        return [key for key in self.tensors if not key.startswith(NOT_WEIGHTS) and EXTRA not in key]

    def _check_files(self, storage: Any) -> None:
        ends: dict[str, int] = {}
        for info in storage.values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        for name, end in ends.items():
            path = self.folder / name
            there = path.stat().st_size if path.is_file() else 0
            if there < end:
                raise ValueError(f"{path} has {there} of {end} bytes: the checkpoint is not whole. Copy it again.")

    def check_whole(self, key: str) -> None:
        """Raises ValueError where the parts of a tensor do not make it up."""
        found = self.tensors[key]
        held = sum(chunk.sizes.numel() for chunk in found.chunks)
        if held < found.size.numel():
            raise ValueError(f"{key} is not whole: its parts in {self.folder} hold {held} of {found.size.numel()} numbers.")

    def read(self, key: str, offsets: Sequence[int], shape: Sequence[int]) -> Tensor:
        """The part of a tensor that begins at `offsets`; it is valid until the next is read."""
        found = self.tensors[key]
        within = [_Within(chunk, offsets, shape) for chunk in found.chunks]
        within = [one for one in within if one.there]
        if len(within) == 1:
            return within[0].of(self._chunk(key, within[0].chunk))
        target = self._memory.tensor(shape, found.properties.dtype)
        for one in within:
            one.place(target).copy_(one.of(self._chunk(key, one.chunk)))
        return target

    def _chunk(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        """As it lies in its file."""
        at = self._where[key, chunk.offsets]
        try:
            tensor = self._mapped(at.relative_path).tensor(at.offset, at.length)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{key} cannot be read from {self.folder / at.relative_path}: {error}") from error
        if (tensor.shape, tensor.dtype) != (chunk.sizes, self.tensors[key].properties.dtype):
            raise ValueError(
                f"{key} in {self.folder / at.relative_path} is not as its .metadata says: the checkpoint is not whole."
            )
        return tensor


class _Within:
    """What of a chunk lies in the part of a tensor that begins at `offsets`."""

    def __init__(self, chunk: ChunkStorageMetadata, offsets: Sequence[int], shape: Sequence[int]) -> None:
        self.chunk, self._offsets = chunk, offsets
        self._starts = [max(a, b) for a, b in zip(chunk.offsets, offsets, strict=True)]
        ends = [min(a + n, b + m) for a, n, b, m in zip(chunk.offsets, chunk.sizes, offsets, shape, strict=True)]
        self._lengths = [end - start for start, end in zip(self._starts, ends, strict=True)]
        self.there = all(length > 0 for length in self._lengths)

    def of(self, chunk: Tensor) -> Tensor:
        """That of the chunk."""
        return self._cut(chunk, self.chunk.offsets)

    def place(self, part: Tensor) -> Tensor:
        """That of the part."""
        return self._cut(part, self._offsets)

    def _cut(self, tensor: Tensor, offsets: Sequence[int]) -> Tensor:
        for axis, (start, offset, length) in enumerate(zip(self._starts, offsets, self._lengths, strict=True)):
            tensor = tensor.narrow(axis, start - offset, length)
        return tensor
