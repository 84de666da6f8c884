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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

TRACKER = "latest_checkpointed_iteration.txt"
COMMON = "common_state/shard_0_1"
"""Where Megatron-core 0.19 keeps it among the tensors of a `torch_dist` checkpoint; releases before it wrote common.pt."""
OF_RANK = "mp_rank_00*/model_optim_rng.pt"
"""The file of the first rank of a `torch` checkpoint, with or without pipeline and expert ranks in its folder's name."""
METADATA = ".metadata"
"""Of torch's distributed checkpoints: `torch_dist`, `torch_dcp` and `fsdp_dtensor`."""
PARTS = ("args", "opt_param_scheduler")
"""What is read of the other formats, which keep it beside the tensors."""
BROKEN = (OSError, EOFError, ImportError, RuntimeError, pickle.UnpicklingError)
UNREADABLE = (*BROKEN, ValueError, AttributeError, TypeError, LookupError)
"""What a file raises that is cut, or of another kind."""


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
    if load and getattr(args, "non_persistent_ckpt_type", None) == "global" and (iteration is not None or not pretrained):
        between = Path(args.non_persistent_global_ckpt_dir or load / "non_persistent")
        if (newer := last_iteration(between)) is not None and newer >= (iteration or 0):
            load, iteration = between, newer
    if iteration is None:  # Megatron then begins with the weights of the other
        load, begins = pretrained, True
        iteration = last_iteration(load) if load else None
    if load is None or iteration is None:
        return None
    return Before(load, iteration, begins, common_state(load, iteration) or {})


def common_state(folder: Path, iteration: int) -> Mapping[str, Any] | None:
    """What all ranks have in common in a checkpoint of any format; None where it cannot be read, which the load will say."""
    return common_state_of(folder_of(folder, iteration))


def common_state_of(checkpoint: Path) -> Mapping[str, Any] | None:
    """The same of the folder of one checkpoint."""
    if not checkpoint.is_dir():
        return None
    try:
        import torch  # takes seconds

        if (checkpoint / "common.pt").is_file():
            return _plain((checkpoint / "common.pt").read_bytes())
        if ranks := sorted(checkpoint.glob(OF_RANK)):  # of which mmap leaves the tensors where they are
            state = torch.load(ranks[0], map_location="cpu", mmap=True, pickle_module=_Plain, weights_only=False)
            return {name: state[name] for name in PARTS if name in state}
        metadata = read_metadata(checkpoint)
        places = {index.fqn: place for index, place in metadata.storage_data.items()}
        if COMMON in places:
            return _read(checkpoint, places[COMMON])[0]
        return _parts(checkpoint, places, metadata.planner_data or {})
    except UNREADABLE:
        return None


def read_metadata(checkpoint: Path) -> Metadata:
    """What one of torch's distributed checkpoints says of its tensors.

    Raises:
        ValueError: a newer torch wrote it, or it is cut.
    """
    import torch
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    try:
        return FileSystemReader(checkpoint).read_metadata()
    except Exception as error:
        raise ValueError(
            f"{checkpoint / METADATA} cannot be read by torch {torch.__version__} ({error}): it was written by a newer torch, "
            "or is cut. Install the torch of the run that wrote it."
        ) from error


def _read(checkpoint: Path, place: Any) -> Any:
    with (checkpoint / place.relative_path).open("rb") as file:
        file.seek(place.offset)
        return _plain(file.read(place.length))


def _parts(checkpoint: Path, places: Mapping[str, Any], paths: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a format that keeps each entry of each dict by itself, and at which path."""
    found: dict[str, Any] = {}
    for name, place in places.items():
        first, *rest = paths.get(name, (name,))
        if first in PARTS and len(rest) < 2:
            value = _read(checkpoint, place)
            if rest:
                found.setdefault(first, {})[rest[0]] = value
            else:
                found[first] = value
    return found


def other_format(checkpoint: Path) -> str | None:
    """In words, that of a checkpoint that is no `torch_dist` one."""
    if any(checkpoint.glob(OF_RANK)):
        return "torch"
    if (checkpoint / METADATA).is_file() and not (checkpoint / "metadata.json").is_file():
        return "torch_dcp or fsdp_dtensor"
    return None


def is_zero(checkpoint: Path, module: str) -> bool:
    """Whether there are tensors of a module of the model in a `torch_dist` checkpoint, and all are 0: those of all its layers.

    Reads piece after piece, up to the first that is not. Of a format that keeps ranks' files it is not known: False.
    """
    if not (checkpoint / METADATA).is_file():
        return False
    stored = read_metadata(checkpoint).storage_data
    names = {index.fqn for index in stored if module in index.fqn and not index.fqn.startswith("optimizer")}
    names = {name for name in names if not name.endswith("_extra_state") and "_extra_state/" not in name}
    for index, place in stored.items():
        if index.fqn not in names:
            continue
        if _read(checkpoint, place).any():
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

    append = extend = add = __setstate__

    def __setitem__(self, name: Any, value: Any) -> None:
        """Of a kind of dict, likewise."""


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
