"""What a program says of a command line that it does not take: one line, with the nearest flag. Imports nothing slow."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, NoReturn

NUMBER = re.compile(r"(?P<flag>\S+): invalid (?P<kind>int|float) value: '(?P<word>.*)'")
"""How argparse says that a word is no number."""
UNITS = {"K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}
"""Of numbers as people write them."""
BINARY = {"K": 2**10, "M": 2**20, "G": 2**30}
"""Of lengths in tokens."""
CHOICE = re.compile(r"invalid choice: '(?P<word>.*)' \(choose from")
"""How argparse says that a word is none of those that a flag takes."""
LENGTH = re.compile(r"(length|lengths|seqlen-\S+|position-embeddings|budget|tile-tokens)$")
"""How flags end whose numbers are lengths in tokens."""
GROUPED = re.compile(r"-?\d{1,3}(,\d{3})+")
WRONG = 2
"""The exit status of a command line that is refused."""
ELSEWHERE = {
    "--rope-theta": "--rotary-base",
    "--rope-scaling": "--use-rope-scaling --rope-scaling-factor",
    "--num-hidden-layers": "--num-layers",
    "--intermediate-size": "--ffn-hidden-size",
    "--head-dim": "--kv-channels",
    **dict.fromkeys(("--num-key-value-heads", "--num-kv-heads"), "--group-query-attention --num-query-groups"),
    **dict.fromkeys(("--rms-norm-eps", "--layernorm-epsilon"), "--norm-epsilon"),
    "--hidden-act": "--swiglu",
    **dict.fromkeys(("--dtype", "--params-dtype"), "--bf16"),
    "--fp8": "--fp8-format",
    **dict.fromkeys(("--lighthouse-k", "--lighthouse-top-k"), "--lighthouse-budget"),
    **dict.fromkeys(("--tp", "--tp-size"), "--tensor-model-parallel-size"),
    **dict.fromkeys(("--pp", "--pp-size"), "--pipeline-model-parallel-size"),
    **dict.fromkeys(("--cp", "--cp-size"), "--context-parallel-size"),
    **dict.fromkeys(("--ep", "--ep-size"), "--expert-model-parallel-size"),
    **dict.fromkeys(("--num-gpus", "--n-gpus", "--ngpus", "--world-size"), "--gpus"),
    **dict.fromkeys(("--learning-rate", "--max-lr"), "--lr"),
    **dict.fromkeys(("--lr-schedule", "--lr-scheduler", "--lr-scheduler-type"), "--lr-decay-style"),
    **dict.fromkeys(("--lr-warmup", "--warmup-steps", "--warmup-iters"), "--lr-warmup-iters"),
    "--max-grad-norm": "--clip-grad",
    **dict.fromkeys(("--max-steps", "--max-iters", "--num-steps"), "--train-iters"),
    **dict.fromkeys(("--context-length", "--max-length", "--max-seq-length", "--max-seq-len"), "--seq-length"),
    **dict.fromkeys(("--per-device-batch-size", "--per-device-train-batch-size"), "--micro-batch-size"),
    "--gradient-accumulation-steps": "--global-batch-size",
    "--gradient-checkpointing": "--recompute-activations",
    **dict.fromkeys(("--use-flash-attention", "--flash-attention", "--flash-attn"), "--attention-backend flash"),
}
"""Flags as other trainers and models' configurations call them: with what Megatron has for it."""
GONE = {
    "batch_size": "--micro-batch-size",
    "warmup": "--lr-warmup-fraction",
    "model_parallel_size": "--tensor-model-parallel-size",
}
"""Arguments of Megatron's that it still parses and then refuses, with the flags that it has now."""
ON = ("use", "apply", "enable", "with")
"""First words of flags that turn something on, and say no more."""
OFF = ("no", "disable", "skip", "without", "dont")
"""Of flags that turn it off."""
NEAR = 0.8
"""How alike two flags must be for one to be taken for the other."""
STRAY = "--"
"""To argparse the end of all flags: all behind it are none."""
NAMED = 3
"""Of several runs of which the same is said, or flags that may be meant, how many are named."""


def once(said: Iterable[tuple[str, str]]) -> list[str]:
    """Each text once, behind the names of those of which it is said; a name may be empty."""
    of: dict[str, list[str]] = {}
    for name, text in said:
        of.setdefault(text, []).append(name)
    more = {text: f" and {len(names) - NAMED} more" if len(names) > NAMED else "" for text, names in of.items()}
    return [f"{', '.join(names[:NAMED])}{more[text]}: {text}" if any(names) else text for text, names in of.items()]


def as_flag(name: str) -> str:
    """The flag of an argument."""
    return f"--{name.replace('_', '-')}"


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


def _flags(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Of a parser, and of its commands: what a command does not know, the program says."""
    found = dict(parser._option_string_actions)
    for action in parser._actions:
        for one in action.choices.values() if isinstance(action, argparse._SubParsersAction) else ():
            found |= _flags(one)
    return found


def with_nearest(message: str, known: Mapping[str, argparse.Action]) -> str:
    """An error of argparse as a sentence; of flags that are not known, with those that may have been meant."""
    if not message.startswith("unrecognized arguments: "):
        return as_sentence(message)
    words = message.partition(": ")[2].split()
    behind = {*known} if STRAY in words else set()  # which are unknown for that alone
    flags = [word for word in words if word.startswith("--") and word.partition("=")[0] not in behind]
    return " ".join(unknown_flag(word, known) for word in flags) or f"{' '.join(words)} follows no flag that takes it."


def as_sentence(message: str) -> str:
    """What argparse has against a value; of a number that it does not read, how it is written."""
    message = message.removeprefix("argument ").rstrip(".")
    found = NUMBER.fullmatch(message)
    if found is None:
        return f"{message}."
    rule = "a whole number, in digits alone" if found["kind"] == "int" else "a number"
    digits = digits_meant(message)
    return f"{found['flag']} {found['word']} must be {rule}: {f'write {digits}' if digits else 'give one'}."


def choice_meant(message: str, choices: Iterable[Any] | None) -> str | None:
    """The choice that a word may stand for, by another case or nearly; None where none is alike."""
    by_lower = {str(choice).lower(): str(choice) for choice in choices or ()}
    found = CHOICE.search(message)
    near = get_close_matches(found["word"].lower(), by_lower, 1, NEAR) if found else []
    return by_lower[near[0]] if near else None


def digits_meant(message: str) -> str | None:
    """How the number is written that a word may stand for which argparse does not read; None where nothing can be told."""
    found = NUMBER.fullmatch(message.removeprefix("argument ").rstrip("."))
    number = _meant(found["word"], UNITS | BINARY if LENGTH.search(found["flag"]) else UNITS) if found else None
    if found is None or number is None or (found["kind"] == "int" and number != int(number)):
        return None
    return f"{number:.0f}" if found["kind"] == "int" else f"{number:g}"


def _meant(word: str, units: Mapping[str, int]) -> float | None:
    """The number that a word may stand for, as 5e5, 500_000, 131,072 or 128K; None where nothing can be told."""
    digits, unit = (word[:-1], units[word[-1].upper()]) if word[-1:].upper() in units else (word, 1)
    digits = digits.replace(",", "") if GROUPED.fullmatch(digits) else digits.replace(",", ".")
    try:
        number = float(digits) * unit
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def unknown_flag(word: str, known: Mapping[str, argparse.Action]) -> str:
    """That a flag is not known, and the nearest that is.

    Args:
        known: by flag, what a parser does with it.
    """
    if word == STRAY:
        return f"{STRAY} among the arguments hides all flags behind it: leave it out."
    name = word.partition("=")[0]
    if (use := ELSEWHERE.get(name)) and {*use.split()} & {*known}:
        return f"{name} is not a known flag: use {use}."
    return f"{name} is not a known flag: {_switched(name, known) or _alike(name, [*known])}"


def _switched(name: str, known: Mapping[str, argparse.Action]) -> str | None:
    """How to have on or off what a flag's first word asks for; None where no flag is of that."""
    first, _, what = name[2:].partition("-")
    switches = {flag for flag, action in known.items() if action.nargs == 0}
    on = f"--{what}"
    if first in OFF:
        if off := next((flag for word in OFF if (flag := f"--{word}-{what}") in switches), None):
            return f"use {off}."
        if on in known:
            return f"leave it out, and {on} too." if on in switches else f"leave it out: {on} takes a value."
        return None
    if first in ON and on in known:
        return f"did you mean {on}?"
    whole = (name[2:], what) if first in ON else (name[2:],)
    off = next((flag for part in whole if (flag := f"--no-{part}") in switches), None)
    return off and f"leave it out, for it is so without {off}."


def _alike(name: str, known: list[str]) -> str:
    """The flags of which one may be meant: none that turns on what `name` turns off."""
    begun = [flag for flag in known if flag.startswith(name)]  # as --data of --data-path
    ended = [flag for flag in known if flag.endswith(name[1:]) and _is_off(flag) == _is_off(name)]  # as --budget
    ended.sort(key=lambda flag: (not flag.startswith("--train-"), len(flag)))
    others = [flag for flag in known if _is_off(flag) or not _is_off(name)]
    near = get_close_matches(name, begun, 1, 0.5) or ended or get_close_matches(name, others, 1, NEAR)
    now = {as_flag(gone): use for gone, use in GONE.items() if use in known}
    meant = [*dict.fromkeys(now.get(flag, flag) for flag in near)][:NAMED]
    if not meant:
        return "leave it out."
    return f"did you mean {' or '.join(filter(None, (', '.join(meant[:-1]), meant[-1])))}?"


def _is_off(flag: str) -> bool:
    return any(word in OFF for word in flag.split("-"))
