"""Megatron's cached order of samples, held to the datasets that it was built from. Imports no Megatron.

Megatron finds it by prefix, split, seed and lengths, never by what the prefix holds: data written again under its name would be
read in the order of the old. A manifest beside the cache has the fingerprints of the .idx files. Where one is another now, what
was cached of that dataset, and of blends with it, is removed, and Megatron builds it again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy

from megatron_lighthouse.mcore.data import indexed
from megatron_lighthouse.mcore.refusal import RefusedError

MANIFEST = "lighthouse-datasets.json"
DESCRIPTION = "-description.txt"
"""How the file ends in which Megatron says what it cached; the arrays' names begin as its does."""
OWN_FOLDER = Path("cache", "GPTDataset_indices")
"""Under a prefix, where there is no --data-cache-path."""


def refresh(prefixes: Iterable[str], folder: str | None, needed: str | None) -> list[str]:
    """Remove what was cached of datasets that have changed since, and what was cut off. One process of a run calls it.

    Args:
        prefixes: of all datasets of the run that lie in a file system.
        folder: --data-cache-path.
        needed: an option with which Megatron does not build a cache, only reads it.

    Returns:
        The prefixes of changed datasets, of which something was cached.

    Raises:
        RefusedError: where it cannot be removed, or nothing would build it again.
    """
    folders: dict[Path, list[str]] = {}
    for prefix in dict.fromkeys(prefixes):
        folders.setdefault(Path(folder) if folder else Path(prefix) / OWN_FOLDER, []).append(prefix)
    return [prefix for place, found in folders.items() for prefix in _refresh(place, found, needed)]


def _refresh(folder: Path, prefixes: list[str], needed: str | None) -> list[str]:
    manifest = _read(folder / MANIFEST)
    now = {prefix: indexed.fingerprint(Path(prefix + ".idx")) for prefix in prefixes}
    changed = []
    for description in sorted(folder.glob(f"*{DESCRIPTION}")):
        of = set(_dataset_paths(_read(description))) & set(prefixes)
        stale = [prefix for prefix in prefixes if prefix in of and _changed(prefix, now[prefix], manifest, description)]
        if stale or (of and _cut_off(description)):
            _remove(description, stale, needed)
        changed += stale
    if manifest != manifest | now:
        _write(folder / MANIFEST, manifest | now)
    return list(dict.fromkeys(changed))


def _changed(prefix: str, now: str, manifest: dict[str, Any], description: Path) -> bool:
    """By the manifest; a cache that is older than it goes by the files' times."""
    if prefix in manifest:
        return bool(manifest[prefix] != now)
    return Path(prefix + ".idx").stat().st_mtime_ns > description.stat().st_mtime_ns


def _cached(description: Path) -> list[Path]:
    start = description.name.removesuffix(DESCRIPTION)
    return sorted(description.parent.glob(f"{start}-*.npy"))


def _cut_off(description: Path) -> bool:
    """Whether an array is not whole: the job that wrote it was ended."""
    for path in _cached(description):
        try:
            numpy.load(path, mmap_mode="r")
        except (ValueError, EOFError):
            return True
    return False


def _remove(description: Path, stale: list[str], needed: str | None) -> None:
    what = (
        f"holds the order of samples of an older {' and '.join(stale)}"
        if stale
        else "holds an order of samples that is cut off"
    )
    if needed:
        raise RefusedError(f"{description} {what}, and {needed} builds none: build the cache again, or leave that out.")
    try:
        for path in (description, *_cached(description)):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise RefusedError(
            f"{description} {what}, and cannot be removed ({error.strerror}): use another --data-cache-path."
        ) from error


def _dataset_paths(found: Any) -> Iterator[str]:
    """The prefixes in what Megatron says of a dataset, or of a blend of them."""
    if isinstance(found, dict):
        if isinstance(path := found.get("dataset_path"), str):
            yield path
        found = list(found.values())
    if isinstance(found, list):
        for part in found:
            yield from _dataset_paths(part)


def _read(path: Path) -> dict[str, Any]:
    """Nothing where the file is not there, or not whole."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, manifest: dict[str, str]) -> None:
    """At once, so that no reader meets half of it. A folder that only lets itself be read goes by the files' times."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(manifest, indent=1))
        partial.replace(path)
    except OSError:
        return
