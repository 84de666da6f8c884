"""Whether a run can make the folders that it writes to, and finds the checkpoint that it begins with. Imports no Megatron."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from megatron_lighthouse.mcore.command_line.kept import FOLDERS
from megatron_lighthouse.mcore.command_line.stored import TRACKER
from megatron_lighthouse.mcore.data.blends import Here, value


def problems(args: argparse.Namespace, here: Here) -> Iterator[str]:
    """What is wrong with the folders that are named, each in a sentence. Who may write where is not asked."""
    for flag in FOLDERS:
        if (path := value(args, flag)) and "://" not in path and (file := _in_the_way(here(path))):
            is_file = "it is" if file == here(path) else f"{file} is"
            yield f"{flag} {path} cannot be made: {is_file} no folder: name another."
    yield from _begins(args, here)


def _in_the_way(path: Path) -> Path | None:
    """What stands where `path`, or a folder that it is in, would be made; None where nothing does, or it is not shown."""
    try:
        there = next((at for at in (path, *path.parents) if at.exists() or at.is_symlink()), None)
        return there if there and not there.is_dir() else None
    except PermissionError:
        return None


def _begins(args: argparse.Namespace, here: Here) -> Iterator[str]:
    """Whether --pretrained-checkpoint is one, where the run has none of its own yet."""
    path = args.pretrained_checkpoint
    if not path or "://" in path or (args.load and here(f"{args.load}/{TRACKER}").is_file()):
        return
    if not here(path).is_dir():
        yield f"--pretrained-checkpoint {path} is not there: give a folder of checkpoints that all nodes see."
    elif not here(f"{path}/{TRACKER}").is_file():
        yield f"--pretrained-checkpoint {path} has no {TRACKER}: give the folder in which that file names the last checkpoint."
