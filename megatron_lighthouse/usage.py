"""What a program says of a command line that it does not take: one line, with the nearest flag. Imports nothing slow."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, NoReturn

WRONG = 2
"""The exit status of a command line that is refused."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and which takes no flag cut short."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **given})

    def error(self, message: str) -> NoReturn:
        one_line(self, message)


def one_line(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """End the program, with one line on the first rank; in place of argparse's usage of every flag.

    Raises:
        SystemExit: with WRONG.
    """
    if os.environ.get("RANK", "0") == "0":
        print(f"{parser.prog}: {with_nearest(message, _flags(parser))} See --help.", file=sys.stderr)
    raise SystemExit(WRONG)


def _flags(parser: argparse.ArgumentParser) -> list[str]:
    """Of a parser, and of its commands: what a command does not know, the program says."""
    commands = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [*parser._option_string_actions, *(flag for made in commands for one in made.values() for flag in _flags(one))]


def with_nearest(message: str, known: Iterable[str]) -> str:
    """An error of argparse as a sentence; of flags that are not known, with those that may have been meant."""
    message = message.removeprefix("argument ")
    if not message.startswith("unrecognized arguments: "):
        return message.rstrip(".") + "."
    words, known = message.partition(": ")[2].split(), [*known]
    flags = [word for word in words if word.startswith("--")]
    return " ".join(unknown_flag(word, known) for word in flags) or f"{' '.join(words)} follows no flag that takes it."


def unknown_flag(word: str, known: Iterable[str]) -> str:
    """That a flag is not known, and the nearest that is."""
    name = word.partition("=")[0]
    near = get_close_matches(name, known, 1, 0.7)
    return f"{name} is not a known flag: {f'did you mean {near[0]}?' if near else 'leave it out.'}"
