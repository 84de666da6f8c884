"""Megatron's `torch_dist` format, written part by part: nothing is whole in memory but one part.

What is written has the names, offsets and objects of Megatron-core's own checkpoints. It goes through torch's public classes.
A file holds few parts, for torch's writer keeps a tensor of every name until the file is written.
"""

from __future__ import annotations

import io
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.serialization import get_crc32_options, set_crc32_options

from megatron_lighthouse.mcore.command_line.stored import common_state_of

FILE_BYTES = 256 << 20
"""Files are closed at this size."""
EXTRA = "._extra_state"
TRACKER, RELEASE = "latest_checkpointed_iteration.txt", "release"
"""Megatron's names: of the file that says which iteration is the newest, and of what is no iteration."""


@dataclass(frozen=True)
class Part:
    """A rectangular part of one tensor of the checkpoint."""

    key: str
    size: tuple[int, ...]
    """Of the whole tensor."""
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    """Gives the data, of any shape with as many elements."""

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def object_key(name: str, place: Sequence[tuple[int, int]]) -> str:
    """Of an object of a module, by number and count along each axis: Megatron's `ShardedObject.unique_key`."""
    numbers, counts = (".".join(map(str, column)) for column in zip(*(place or [(0, 1)]), strict=True))
    return f"{name}/shard_{numbers}_{counts}"


def write(folder: Path, parts: Sequence[Part], objects: dict[str, Any], wrote: Callable[[int], object]) -> None:
    """A checkpoint of `parts` and `objects`, in `folder`.

    Args:
        wrote: called with the bytes of each part, once written.
    """
    writer = FileSystemWriter(folder, sync_files=False, per_thread_copy_ahead=0)
    planner = _Lazy(parts, objects, wrote)
    writer.set_up_storage_writer(True)
    writer.prepare_local_plan(SavePlan([]))
    plans = writer.prepare_global_plan([SavePlan(items) for items in planner.files()])
    with _no_checksums():
        results = [writer.write_data(plan, planner).wait() for plan in plans]
    writer.finish(Metadata(planner.described()), results)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')


@contextmanager
def _no_checksums() -> Iterator[None]:
    """Torch never reads those of its archives, and they take longer than the copy does."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)


class _Lazy(SavePlanner):
    """Reads a part when it is to be written."""

    def __init__(self, parts: Sequence[Part], objects: dict[str, Any], wrote: Callable[[int], object]) -> None:
        self._parts = {(part.key, part.offsets): part for part in parts}
        self._objects, self._wrote = objects, wrote

    def files(self) -> Iterator[list[WriteItem]]:
        """What each file holds: the objects, then parts in their order."""
        items = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self._objects]
        held = 0
        for part in self._parts.values():
            if held and held + part.bytes > FILE_BYTES:
                yield items
                items, held = [], 0
            chunk = ChunkStorageMetadata(torch.Size(part.offsets), torch.Size(part.shape))
            data = TensorWriteData(chunk, TensorProperties(part.dtype), torch.Size(part.size))
            items.append(WriteItem(MetadataIndex(part.key, part.offsets), WriteItemType.SHARD, tensor_data=data))
            held += part.bytes
        yield items

    def described(self) -> dict[str, Any]:
        found: dict[str, Any] = {key: BytesStorageMetadata() for key in self._objects}
        for part in self._parts.values():
            whole = found.setdefault(part.key, TensorStorageMetadata(TensorProperties(part.dtype), torch.Size(part.size), []))
            whole.chunks.append(ChunkStorageMetadata(torch.Size(part.offsets), torch.Size(part.shape)))
        return found

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            held = io.BytesIO()
            torch.save([self._objects[write_item.index.fqn]], held)
            return held
        part = self._parts[write_item.index.fqn, tuple(write_item.index.offset or ())]
        data = part.read().contiguous().reshape(part.shape)
        if data.dtype != part.dtype:
            raise ValueError(f"{part.key} turned out {data.dtype}, not {part.dtype} as announced.")
        self._wrote(part.bytes)
        return data

    def set_up_planner(self, *_: Any, **__: Any) -> None:
        """Nothing: there is one process."""

    def create_local_plan(self) -> SavePlan:
        raise NotImplementedError

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        raise NotImplementedError

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        raise NotImplementedError


def stored_arguments(folder: Path) -> Namespace | None:
    """Megatron's, of the run that wrote the checkpoint; None where it does not say."""
    return (common_state_of(folder) or {}).get("args")


def latest(folder: Path, step: int | None = None) -> Path:
    """The checkpoint of a folder that a run was given as --save: the newest, or that of an iteration.

    Raises:
        ValueError: there is none.
    """
    tracker = folder / TRACKER
    if not tracker.is_file():
        raise ValueError(f"{folder} holds no checkpoint of Megatron's: name the folder that the run was given as --save.")
    said = tracker.read_text().strip()
    if said != RELEASE and not said.isdecimal():
        raise ValueError(f"{tracker} says {said!r}, which is no iteration: give --ckpt-step.")
    name = f"iter_{step:07d}" if step is not None else said if said == RELEASE else f"iter_{int(said):07d}"
    if not (folder / name).is_dir():
        there = ", ".join(sorted(path.name for path in _checkpoints(folder)))
        raise ValueError(f"{folder} has no {name}: there is {there or 'none'}.")
    return folder / name


def _checkpoints(folder: Path) -> Iterable[Path]:
    return (path for path in folder.iterdir() if path.name == RELEASE or path.name.startswith("iter_"))
