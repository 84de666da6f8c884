"""What `check` asks of the files of a run: data, tokenizer, and whether a container sees them.

Imports no Megatron.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from megatron_lighthouse.mcore.command_line.kept import WRITTEN
from megatron_lighthouse.mcore.data import blends, files, tokenizers
from megatron_lighthouse.mcore.data.blends import LISTS, TOKENIZERS, remote, value

DESCRIPTIONS = ("--heterogeneous-layers-config-path", "--te-precision-config-file", "--tp-comm-overlap-cfg")
"""Files that say what the model is, or how it is run."""
LEFT = """
    --memory-snapshot-path --flight-recorder-dump-path --moe-routing-trace-path --non-persistent-global-ckpt-dir
    --nccl-communicator-config-path --config-logger-dir
""".split()
"""Paths beside `WRITTEN` of which something is left, or read. In a container of its own it would be lost."""
type Sees = dict[str, str]
"""A container's folders, and what they are on this machine; none without a container."""


def here(sees: Sees, path: str) -> Path:
    """Where a path of the container is on this machine."""
    inside = max((folder for folder in sees if Path(path).is_relative_to(folder)), key=len, default=None)
    return Path(path) if inside is None else Path(sees[inside]) / Path(path).relative_to(inside)


def data(args: argparse.Namespace, sees: Sees | None) -> Iterator[str]:
    """Whether there is data, and every file of it is whole; with None, of which no file is looked for."""
    if not blends.sources(args):
        yield "the run has no data: add --data-path PREFIX, --text-data PATH or --mock-data after the --."
    if sees is not None:
        yield from files.problems(args, partial(here, sees))


def descriptions(args: argparse.Namespace, sees: Sees) -> Iterator[str]:
    """Whether files that describe the run are there."""
    for name in DESCRIPTIONS:
        if (path := value(args, name)) and not remote(path) and not here(sees, path).is_file():
            yield f"{name} {path} is not there: give a file that all nodes see."


def unseen(args: argparse.Namespace, sees: Sees) -> Iterator[str]:
    """Paths that a container does not see."""
    for name, path in _paths(args, sees) if sees else ():
        if not remote(path) and not any(Path(path).is_relative_to(folder) for folder in sees):
            yield (
                f"{name} {path} is not in the container (IMAGE), which sees {' '.join(sees)}: "
                "give a path under one of these, or add its folder to MOUNTS."
            )


def _paths(args: argparse.Namespace, sees: Sees) -> Iterator[tuple[str, str]]:
    """Each path that the command line names, or a list in it, after its option."""
    try:
        for name, words in blends.blends(args, partial(here, sees)):
            yield from ((name, prefix) for prefix in blends.prefixes(name, words))
    except ValueError:
        pass  # `data` says so
    yield from (("--text-data", path) for path in args.text_data or ())
    for name in (*LISTS, "--per-dataset-sequences-path", "--pretrained-checkpoint", *DESCRIPTIONS):
        if path := value(args, name):
            yield name, path
    for name in (*WRITTEN, *LEFT):
        if name[2:].replace("-", "_") in args.said and (path := value(args, name)):
            yield name, path
    for name in TOKENIZERS:
        if path := tokenizers.file_of(args, name, partial(here, sees)):
            yield name, path
