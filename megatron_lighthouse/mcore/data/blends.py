"""Which datasets a command line names: the options of a run's data, and the prefixes in them. Imports no Megatron."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

SPLITS = ("train", "valid", "test")
DATA = ("--data-path", *(f"--{split}-data-path" for split in SPLITS))
LISTS = ("--data-args-path", "--per-split-data-args-path")
"""Files that hold what stands after --data-path, or after each of the others."""
SPLIT = ("--data-path", "--data-args-path", "--mock-data")
"""Sources that --split shares out: the others have their parts already."""
TOKENIZERS = ("--tokenizer-model", "--vocab-file", "--merge-file")
REMOTE = ("s3://", "msc://")
WEIGHT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)
"""Of a dataset, in digits: one may be called nan, or infinity."""

type Here = Callable[[str], Path]
"""Where a path is on this machine."""


def value(args: argparse.Namespace, name: str) -> Any:
    """Of the option of this name."""
    return getattr(args, name[2:].replace("-", "_"), None)


def sources(args: argparse.Namespace) -> list[str]:
    """The options that say what a run reads: more than one, but for those of the splits, contradict each other."""
    return [name for name in (*DATA, *LISTS, "--text-data", "--mock-data") if value(args, name) not in (None, False)]


def exclusion(args: argparse.Namespace) -> str | None:
    """That the words name more than one source; and what else has to go, by the source that stays."""
    given = sources(args)
    if len(given) < 2 or set(given) <= set(DATA[1:]):
        return None
    too = [f", with {name} {' and '.join(words)} too" for name in given if (words := without(args, name))]
    return f"{' and '.join(given)} are each the data of a run: leave all but one out{''.join(too)}."


def without(args: argparse.Namespace, source: str) -> list[str]:
    """Of what the words say, with values, what does not go with a source: it has that already."""
    split = value(args, "--split") is not None and source not in SPLIT
    tokenizer = source == "--text-data" and args.tokenizer_type != "NullTokenizer"
    return [f"{name} {value(args, name)}" for name, wrong in (("--split", split), ("--tokenizer-type", tokenizer)) if wrong]


def remote(path: str) -> bool:
    """Whether it is in object storage, which nothing here looks into."""
    return path.startswith(REMOTE)


def blends(args: argparse.Namespace, here: Here) -> Iterator[tuple[str, list[str]]]:
    """Each option or list of datasets, with its words.

    Raises:
        ValueError: a list that cannot be read, or is none.
    """
    for name in DATA:
        if (words := value(args, name)) is not None:
            yield name, words
    for name in LISTS:
        if not (path := value(args, name)) or remote(path):
            continue
        text = _text(name, path, here)
        if name == LISTS[0]:
            yield f"{name} {path}:", text.split()
        else:
            yield from _per_split(f"{name} {path}", text)


def _text(name: str, path: str, here: Here) -> str:
    try:
        text = here(path).read_text()
    except OSError as error:
        reason = error.strerror
        raise ValueError(f"{name} {path} cannot be read ({reason}): give a file of prefixes that all nodes see.") from error
    except UnicodeError as error:
        raise ValueError(f"{name} {path} is no text: give a file of prefixes.") from error
    if text.startswith("\ufeff"):  # not to be seen in what Megatron would look for
        raise ValueError(f"{name} {path} begins with a byte order mark, which Megatron reads as text: save it without one.")
    return text


def _per_split(name: str, text: str) -> Iterator[tuple[str, list[str]]]:
    use = f"give a JSON object with {', '.join(SPLITS)}, each null or a list of prefixes."
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} is no JSON ({error}): {use}") from error
    if not isinstance(found, dict) or not set(SPLITS) <= set(found):
        raise ValueError(f"{name} does not name all splits: {use}")
    for split in SPLITS:
        words = found[split].split() if isinstance(found[split], str) else found[split]
        if words is not None and not (isinstance(words, list) and all(isinstance(word, str) for word in words)):
            raise ValueError(f"{name} has for {split} neither null nor words: {use}")
        if words is not None:
            yield f"{name}, {split}:", words


def prefixes(name: str, words: Sequence[str]) -> list[str]:
    """The prefixes among the words of a blend, as Megatron tells them from weights.

    Raises:
        ValueError: none, or weights that mean nothing.
    """
    if not words:
        raise ValueError(f"{name} names no dataset: give the prefix of an indexed dataset.")
    numbers = [_number(word) for word in words[::2]]
    weighted = len(words) % 2 == 0 and any(number is not None for number in numbers)  # as Megatron tells
    found = [word.strip() for word in (words[1::2] if weighted else words)]
    if len(words) > 1 and any(map(WEIGHT.fullmatch, found)):
        raise ValueError(
            f"{name} {' '.join(words)} has a number where Megatron reads a prefix: weights and prefixes come in pairs, so give "
            "one weight before each prefix, or none (a dataset whose name is a number as ./1)."
        )
    if not weighted:
        return found
    weights = [number for number in numbers if number is not None]
    if len(weights) < len(numbers):
        raise ValueError(f"{name} {' '.join(words)} has weights for some datasets: give one before each prefix, or none.")
    if not all(0 <= weight < math.inf for weight in weights) or not sum(weights):
        raise ValueError(f"{name} {' '.join(words)} has weights that are no shares: give numbers from 0 on, one above it.")
    return found


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
