"""Whether the data of a run is there and whole: asked before a job is queued, and by every rank before it trains.

Imports no Megatron.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator

from megatron_lighthouse.mcore.command_line import conversations
from megatron_lighthouse.mcore.data import blends, conversation_files, indexed, plain, text, tokenizers, vocabulary
from megatron_lighthouse.mcore.data.blends import Here, remote


def problems(args: argparse.Namespace, here: Here, whole: bool = True) -> Iterator[str]:
    """What is wrong with the options and the files that name data, each in a sentence.

    Args:
        whole: see `indexed.problem`.
    """
    if problem := blends.exclusion(args):  # what else is wrong with the data depends on which stays
        yield problem
        yield from _not_there(args, here)
    else:
        yield from _of_source(args, here, whole)
    yield from tokenizers.problems(args, here)
    yield from vocabulary.size_problems(args)


def _not_there(args: argparse.Namespace, here: Here) -> Iterator[str]:
    """Datasets that are not there, of all sources."""
    try:
        for name, words in () if conversations.asked(args) else blends.blends(args, here):
            for prefix in blends.prefixes(name, words):
                if not remote(prefix) and (message := _dataset(name, prefix, here, whole=False)):
                    yield message
    except ValueError as error:
        yield str(error)


def _of_source(args: argparse.Namespace, here: Here, whole: bool) -> Iterator[str]:
    """What is wrong with the data, of which there is one source at most."""
    source = next(iter(blends.sources(args)), None)
    if source and args.split is not None and source not in blends.SPLIT:
        yield f"--split {args.split} does not go with {source}, which has its parts already: leave it out."
    counts: dict[str, tuple[int, int]] = {}
    rows: dict[str, int] = {}
    filled: list[str] = []
    try:
        for name, words in blends.blends(args, here):
            found = blends.prefixes(name, words)
            if len(found) == 1 or len(found) < len(words):  # else Megatron reads each dataset once, however little it has
                filled += found
            for prefix in found:
                if conversations.asked(args):
                    if message := _conversations(name, prefix, here, whole):
                        yield message
                    elif whole:  # the first rank says it: others need not count lines
                        rows[prefix] = len(conversation_files.Conversations(here(prefix)))
                elif remote(prefix):
                    yield from _storage(args, name, prefix)
                elif message := _dataset(name, prefix, here, whole):
                    yield message
                else:
                    header = indexed.read_header(here(prefix + ".idx"))
                    counts[prefix] = header.sequences, header.documents
                    rows[prefix] = header.sequences
                    if whole:
                        yield from vocabulary.problems(args, name, prefix, here)
        yield from _splits(args, {prefix: rows[prefix] for prefix in filled if prefix in rows})
        yield from _sequences(args, counts, here)
        if args.text_data is not None:
            yield from _text(args, here, whole)
    except ValueError as error:
        yield str(error)


def _dataset(name: str, prefix: str, here: Here, whole: bool) -> str | None:
    """Why the two files of a prefix are no dataset."""
    idx, data = here(prefix + ".idx"), here(prefix + ".bin")
    missing = [prefix + path.suffix for path in (data, idx) if not path.is_file()]
    if missing:
        return f"{name} {prefix} has no {' and no '.join(missing)}: give the prefix of an indexed dataset."
    found = indexed.problem(idx, data, whole)
    return f"{name} {prefix}: {prefix}{found}: copy or write the dataset again, both files." if found else None


def _conversations(name: str, prefix: str, here: Here, whole: bool) -> str | None:
    """Why a path holds no conversations."""
    if remote(prefix):
        asks = conversations.FLAG
        return f"{name} {prefix} is in object storage, where {asks} does not read: copy it to a path that all nodes see."
    return conversation_files.problem(name, prefix, here(prefix), whole)


def _storage(args: argparse.Namespace, name: str, prefix: str) -> Iterator[str]:
    """What object storage asks of the command line: no file of it is looked at."""
    needs = [
        ("--object-storage-cache-path FOLDER", args.object_storage_cache_path),
        ("--no-mmap-bin-files", not args.mmap_bin_files),
    ]
    needs += [("--enable-msc", args.enable_msc)] if prefix.startswith("msc://") else []
    if missing := [option for option, given in needs if not given]:
        yield f"{name} {prefix} is in object storage: add {' '.join(missing)}."


def _splits(args: argparse.Namespace, counts: dict[str, int]) -> Iterator[str]:
    """Whether each part of --split has a row of datasets of so many: Megatron would fill it from none."""
    if args.data_path is None and args.data_args_path is None:
        return
    split = args.split or "969, 30, 1"  # Megatron's
    try:
        shares = [float(share) for share in re.findall(r"[.0-9]+", split)]
        shares = [share / sum(shares) for share in shares or [0.0]]
    except (ValueError, ZeroDivisionError):
        yield f"--split {split} must be up to three numbers from 0 on, one of them above it: use 969,30,1, Megatron's default."
        return
    if args.eval_iters and not sum(shares[1:2]):  # Megatron would read from no loader
        yield (
            f"--split {split.replace(' ', '')} leaves nothing to validate on, which --eval-iters {args.eval_iters} asks for: "
            "use --eval-iters 0, or a second share, as in --split 99,1,0."
        )
    kind = "rows" if conversations.asked(args) else "sequences"
    for prefix, rows in counts.items():
        edges = [round(sum(shares[:n]) * rows) for n in range(len(shares) + 1)]
        parts = zip(blends.SPLITS, shares, edges, edges[1:], strict=False)
        if empty := [part for part, share, first, end in parts if share > 0 and first == end]:
            use = f"{rows - 1},1,0" if rows > 1 else "1,0,0 --eval-iters 0"
            yield (
                f"--split {split.replace(' ', '')} leaves none of the {rows} {kind} of {prefix} to "
                f"{' and '.join(empty)}: use --split {use}, or paths for each part (--train-data-path, --valid-data-path)."
            )


def _sequences(args: argparse.Namespace, counts: dict[str, tuple[int, int]], here: Here) -> Iterator[str]:
    """Whether --per-dataset-sequences-path says of each dataset what its .idx does, which Megatron then does not read."""
    name, path = "--per-dataset-sequences-path", args.per_dataset_sequences_path
    if path is None:
        return
    try:
        said = json.loads(here(path).read_text())
        wrong = [prefix for prefix, found in counts.items() if tuple(said[prefix]) != found]
    except KeyError as error:
        yield f"{name} {path} does not name {error}: write it again, for all datasets."
    except (OSError, ValueError, TypeError) as error:
        yield f"{name} {path} cannot be read ({error}): give a JSON object of prefixes, each with its sequences and documents."
    else:
        yield from (f"{name} {path} has other counts of {prefix} than its .idx: write it again." for prefix in wrong)


def _text(args: argparse.Namespace, here: Here, whole: bool) -> Iterator[str]:
    """Whether plain text is there, and enough of it for a sequence."""
    if missing := [path for path in args.text_data if not here(path).exists()]:
        yield from (f"--text-data {path} is not there: give a path that all nodes see." for path in missing)
        return
    found = text.training_files([here(path) for path in args.text_data])
    if whole:
        yield from plain.problems("--text-data", [here(path) for path in args.text_data])
    total = sum(file.stat().st_size for file in found)
    if args.seq_length and (trained := total - total // text.HELD_OUT) <= args.seq_length:
        yield (
            f"--text-data has {trained:,} bytes for training, and a sequence of --seq-length {args.seq_length} takes more: "
            "give more text, or a smaller --seq-length."
        )
