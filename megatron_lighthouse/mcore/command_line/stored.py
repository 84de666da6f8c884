"""What the last checkpoint holds beside its tensors: arguments, and the state of the schedule. Imports no Megatron.

Megatron's own reading imports it, which a login node may not have; so classes that are not torch's are read as empty ones.
"""

from __future__ import annotations

import argparse
import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRACKER = "latest_checkpointed_iteration.txt"
COMMON = "common_state/shard_0_1"
"""Where Megatron-core 0.19 keeps it among the tensors; releases before it wrote common.pt."""


def last_iteration(folder: Path) -> int | None:
    """The iteration of the last whole checkpoint in a folder; None where there is none, or it is a release."""
    try:
        return int((folder / TRACKER).read_text())
    except (OSError, ValueError):
        return None


def folder_of(folder: Path, iteration: int) -> Path:
    """Of one checkpoint, in a folder of them."""
    return folder / f"iter_{iteration:07}"


@dataclass(frozen=True)
class Before:
    """The checkpoint that a run starts from."""

    folder: Path
    iteration: int
    begins: bool
    """Whether a new run begins with its weights; else its own goes on."""
    state: Mapping[str, Any]
    """What all ranks have in common; empty where it cannot be read."""

    @property
    def args(self) -> Any | None:
        """Its arguments; None where they cannot be read."""
        return self.state.get("args")

    @property
    def checkpoint(self) -> Path:
        """The folder of the one checkpoint."""
        return folder_of(self.folder, self.iteration)


def folders(args: argparse.Namespace) -> tuple[Path | None, Path | None]:
    """--load and --pretrained-checkpoint of Megatron's arguments."""
    load, pretrained = args.load, getattr(args, "pretrained_checkpoint", None)
    return Path(load) if load else None, Path(pretrained) if pretrained else None


def before(args: argparse.Namespace, load: Path | None, pretrained: Path | None = None) -> Before | None:
    """What a run starts from; None where it starts from nothing.

    Args:
        args: Megatron's, validated or not.
        load, pretrained: --load and --pretrained-checkpoint, where this machine has them.
    """
    begins, iteration = args.finetune, (args.ckpt_step or last_iteration(load)) if load else None
    if iteration is None:  # Megatron then begins with the weights of the other
        load, begins = pretrained, True
        iteration = last_iteration(load) if load else None
    if load is None or iteration is None:
        return None
    return Before(load, iteration, begins, common_state(load, iteration) or {})


def common_state(folder: Path, iteration: int) -> Mapping[str, Any] | None:
    """What all ranks have in common in a `torch_dist` checkpoint; None where it cannot be read, which the load will say."""
    return common_state_of(folder_of(folder, iteration))


def common_state_of(checkpoint: Path) -> Mapping[str, Any] | None:
    """The same of the folder of one checkpoint."""
    if not checkpoint.is_dir():
        return None
    try:
        from torch.distributed.checkpoint.filesystem import FileSystemReader  # takes as long to import as all of torch

        if (checkpoint / "common.pt").is_file():
            return _plain((checkpoint / "common.pt").read_bytes())
        stored = FileSystemReader(checkpoint).read_metadata().storage_data
        where = next(place for index, place in stored.items() if index.fqn == COMMON)
        with (checkpoint / where.relative_path).open("rb") as file:
            file.seek(where.offset)
            return _plain(file.read(where.length))[0]
    except (OSError, StopIteration, ImportError, EOFError, RuntimeError, ValueError, AttributeError, pickle.UnpicklingError):
        return None


def is_zero(checkpoint: Path, module: str) -> bool:
    """Whether there are tensors of a module of the model in a `torch_dist` checkpoint, and all are 0: those of all its layers.

    Reads piece after piece, up to the first that is not.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    stored = FileSystemReader(checkpoint).read_metadata().storage_data
    names = {index.fqn for index in stored if module in index.fqn and not index.fqn.startswith("optimizer")}
    names = {name for name in names if not name.endswith("_extra_state") and "_extra_state/" not in name}
    for index, place in stored.items():
        if index.fqn not in names:
            continue
        with (checkpoint / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            piece = _plain(file.read(place.length))
        if piece.any():
            return False
    return bool(names)


def _plain(written: bytes) -> Any:
    import torch

    return torch.load(io.BytesIO(written), map_location="cpu", pickle_module=_Plain, weights_only=False)


class _Empty:
    """In place of an object of any other class."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Takes whatever it was made of."""

    def __setstate__(self, state: Any) -> None:
        """Keeps nothing."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = module.partition(".")[0] == "torch" or (module, name) in {
            ("argparse", "Namespace"),
            ("types", "SimpleNamespace"),
            ("collections", "OrderedDict"),
        }
        return super().find_class(module, name) if known else _Empty


class _Plain:
    """A `pickle_module` for `torch.load`."""

    Unpickler = _Unpickler

    @staticmethod
    def load(file: Any, **options: Any) -> Any:
        return _Unpickler(file, **options).load()
