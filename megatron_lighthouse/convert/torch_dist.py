"""Megatron's `torch_dist` format, written and read part by part: nothing is whole in memory but one part.

What is written has the names, offsets and objects of Megatron-core's own checkpoints. It goes through torch's public classes.
A file holds few parts, for torch's writer keeps a tensor of every name until the file is written.
"""

from __future__ import annotations

import io
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

FILE_BYTES = 256 << 20
"""Files are closed at this size."""
NOT_WEIGHTS = ("optimizer", "rng_state", "rerun_state_machine_state", "common_state", "opt_param_scheduler", "content_metadata")
"""What the names of a run's other state begin with."""
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
    results = [writer.write_data(plan, planner).wait() for plan in plans]
    writer.finish(Metadata(planner.described()), results)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')


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


class TorchDist:
    """The tensors of a `torch_dist` checkpoint of any layout, read part by part.

    Raises:
        ValueError: another format, one of a newer torch, a file that is missing or cut, or a tensor with a gap.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / ".metadata").is_file():
            raise ValueError(
                f"{folder} holds no .metadata: it is no checkpoint of --ckpt-format torch_dist, or an unfinished one."
            )
        self._reader = FileSystemReader(folder)
        try:
            metadata = self._reader.read_metadata()
        except Exception as error:
            raise ValueError(
                f"{folder}/.metadata cannot be read by torch {torch.__version__} ({error}): it was written by a newer torch, "
                "or is cut. Install the torch of the run that wrote it."
            ) from error
        self._reader.set_up_storage_reader(metadata, True)
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: found for key, found in metadata.state_dict_metadata.items() if isinstance(found, TensorStorageMetadata)
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
        """The part of a tensor that begins at `offsets`; reads the parts of the file that it meets, one after the other."""
        found = self.tensors[key]
        target = torch.empty([*shape], dtype=found.properties.dtype)
        for chunk in found.chunks:
            if item := _overlap(key, chunk, offsets, shape):
                self._reader.read_data(LoadPlan([item]), _Into(target)).wait()
        return target


def _overlap(key: str, chunk: ChunkStorageMetadata, offsets: Sequence[int], shape: Sequence[int]) -> ReadItem | None:
    """What of `chunk` lies in the part at `offsets`."""
    starts = [max(a, b) for a, b in zip(chunk.offsets, offsets, strict=True)]
    ends = [min(a + n, b + m) for a, n, b, m in zip(chunk.offsets, chunk.sizes, offsets, shape, strict=True)]
    lengths = [end - start for start, end in zip(starts, ends, strict=True)]
    if any(length <= 0 for length in lengths):
        return None
    return ReadItem(
        type=LoadItemType.TENSOR,
        dest_index=MetadataIndex(key),
        dest_offsets=torch.Size([a - b for a, b in zip(starts, offsets, strict=True)]),
        storage_index=MetadataIndex(key, chunk.offsets),
        storage_offsets=torch.Size([a - b for a, b in zip(starts, chunk.offsets, strict=True)]),
        lengths=torch.Size(lengths),
    )


class _Into(LoadPlanner):
    """Reads into one tensor."""

    def __init__(self, target: Tensor) -> None:
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        part = self._target
        for axis, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(axis, offset, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing: it was copied in place."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise NotImplementedError

    def set_up_planner(self, *_: Any, **__: Any) -> None:
        """Nothing: there is one process."""

    def create_local_plan(self) -> LoadPlan:
        raise NotImplementedError

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        raise NotImplementedError

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        raise NotImplementedError


def stored_arguments(folder: Path) -> Namespace | None:
    """Megatron's, of the run that wrote the checkpoint; None where it does not say."""
    from megatron.core import dist_checkpointing

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # it is: this is one process
        return dist_checkpointing.load_common_state_dict(str(folder)).get("args")


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
