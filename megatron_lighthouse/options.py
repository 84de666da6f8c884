"""Command-line arguments of a frozen dataclass: a field says its default, its help, and the values it takes.

Errors of the library name its arguments, such as `config.budget` and `cp_group`; `in_flags` says them in flags.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import Field, field, fields
from typing import Any


def option(
    default: Any,
    text: str,
    choices: Collection[str] = (),
    by_length: bool = False,
    by_model: str | None = None,
    by_checkpoint: bool = False,
) -> Any:
    """A field of a config with its help; the default is added to that unless the text says it.

    Args:
        choices: read when flags are made of the field: what is registered by then counts.
        by_length: the command line has no default of its own (None): what the sequence length asks for is taken.
        by_model: a word that only the command line knows, and its default: what the model asks for is taken.
        by_checkpoint: the command line has no default of its own (None): what goes on from a checkpoint takes the checkpoint's.
    """
    known = {"help": text, "choices": choices, "open": by_length or by_checkpoint, "by_model": by_model}
    return field(default=default, metadata=known)


def flag_of(prefix: str, name: str) -> str:
    """The flag of the field `name` of the attention `prefix`."""
    return f"--{prefix}-{name.replace('_', '-')}"


def as_words(flag: str, value: Any) -> str:
    """A flag and its value as a command line has them: of a switch the flag alone, of a window 128,0."""
    if value is True:
        return flag
    return f"{flag} {','.join(map(str, value)) if isinstance(value, tuple) else value}"


SAID = {
    "query's N": "--seq-length",
    "cp_group.size()": "--context-parallel-size",
    "cp_comm_type": "--cp-comm-type",
    "Transformer Engine's layers": "--transformer-impl transformer_engine",
}
"""What the library says of its arguments, and the flags of Megatron's that decide them."""


def in_flags(message: str, prefix: str = "lighthouse") -> str:
    """An error of the library in the words of the command line: `config.budget` is --lighthouse-budget."""
    for name, flag in SAID.items():
        message = message.replace(name, flag)

    def said(found: re.Match[str]) -> str:
        return flag_of(f"no-{prefix}" if found[2] == "False" else prefix, found[1])

    # a bool is what its flag says, unless it is said to be of a wrong type
    return re.sub(r"\bconfig\.([a-z]\w*)(?: (True|False)\b(?! must))?", said, message)


@contextmanager
def errors_in_flags(prefix: str = "lighthouse") -> Iterator[None]:
    """A ValueError raised inside is said in the words of the command line."""
    try:
        yield
    except ValueError as error:
        raise ValueError(in_flags(str(error), prefix)) from None


def add_options(group: argparse._ArgumentGroup, prefix: str, config: type) -> None:
    """Add `--<prefix>-…` for each field of the dataclass `config`; a bool has a `--no-<prefix>-…` too."""
    for one in fields(config):
        text, by_model = one.metadata["help"], one.metadata["by_model"]
        default = None if one.metadata["open"] else by_model or one.default
        says = "what the sequence length asks for" if default is None else "%(default)s"
        given: dict[str, Any] = {"help": text if "Default:" in text else f"{text} Default: {says}."}
        if isinstance(one.default, bool):
            given["action"] = argparse.BooleanOptionalAction
        elif one.metadata["choices"]:
            given["choices"] = [*([by_model] if by_model else []), *one.metadata["choices"]]
        else:
            given["type"] = type(one.default)
        group.add_argument(flag_of(prefix, one.name), default=default, **given)


def read_options(args: argparse.Namespace, prefix: str, config: type) -> Any:
    """The `config` that arguments ask for, with defaults for what is None or not there: those of a checkpoint may be older.

    Raises its constructor's ValueError, in flags.
    """
    given = {one.name: getattr(args, _dest(prefix, one), None) for one in fields(config)}
    with errors_in_flags(prefix):
        return config(**{name: value for name, value in given.items() if value is not None})


def set_options(args: argparse.Namespace, prefix: str, config: type) -> Iterator[str]:
    """The options of `config` that have another value than their default, as they are written."""
    for one in fields(config):
        default = None if one.metadata["open"] else one.metadata["by_model"] or one.default
        if (value := getattr(args, _dest(prefix, one), default)) != default:
            yield in_flags(f"config.{one.name} {value}", prefix)


def _dest(prefix: str, one: Field[Any]) -> str:
    return f"{prefix}_{one.name}".replace("-", "_")
