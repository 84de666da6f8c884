"""Megatron's command line where Megatron is not: a list of its flags, and a parser made of it. Imports no Megatron.

`python -m megatron_lighthouse.mcore.command_line.flags` writes the list again, of the Megatron that is installed; a test holds
the one to the other.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from megatron_lighthouse.usage import as_sentence, unknown_flag

VERSION = "0.19.2"
"""Of the Megatron-core whose flags are listed."""
LIST = Path(__file__).with_name("megatron_flags.jsonl")
ACTIONS = {
    "_StoreAction": "store",
    "_StoreTrueAction": "store_true",
    "_StoreFalseAction": "store_false",
    "BooleanOptionalAction": argparse.BooleanOptionalAction,
}
BY_ENVIRONMENT = {"inprocess_active_world_size": "WORLD_SIZE"}
"""Arguments whose default Megatron takes from the environment, and from where."""
OF_CONFIG = {
    "num_moe_experts": "--num-experts",
    "fp8_param": "--fp8-param-gather",
    "num_layers_in_first_pipeline_stage": "--decoder-first-pipeline-num-layers",
    "num_layers_in_last_pipeline_stage": "--decoder-last-pipeline-num-layers",
}
"""Names of Megatron's configs, and of which flags they come."""
type Add = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]


def installed() -> str | None:
    """The release of the Megatron-core that can be imported; None where there is none."""
    try:
        return version("megatron-core")
    except PackageNotFoundError:
        return None


@cache
def listed() -> tuple[dict[str, Any], ...]:
    """Of each flag: names, dest, action, nargs, type, choices and default, where they are not argparse's."""
    return tuple(json.loads(line) for line in LIST.read_text().splitlines())


class WordsError(ValueError):
    """What argparse has against a command line."""


class _Said(argparse.Namespace):
    """Holds what words say, and no default: to argparse all that is missing looks set."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class _Strict(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise WordsError(as_sentence(message))


def parser(add_arguments: Add) -> argparse.ArgumentParser:
    """A parser of Megatron's flags, and of what `add_arguments` adds; its errors are `WordsError`s."""
    made = _Strict(allow_abbrev=False, add_help=False)
    for flag in listed():
        made.add_argument(*flag["flags"], **_how(flag))
    return add_arguments(made)


def parse(words: Sequence[str], add_arguments: Add, strict: bool = True) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and what is wrong with the words, each in a sentence.

    The arguments' `said` holds the names of those that the words give, be it their default.

    Args:
        strict: whether a flag that is not listed is wrong: a Megatron of another release may know it.

    Raises:
        WordsError: a value that its flag does not take.
    """
    made = parser(add_arguments)
    args, rest = made.parse_known_args(words)
    args.said = frozenset(vars(made.parse_known_args(words, _Said())[0]))
    wrong = [unknown_flag(word, made._option_string_actions) for word in rest if word.startswith("-")]
    if rest and not wrong:
        wrong = [f"{' '.join(rest)} follows no flag that takes it: leave it out."]
    return args, wrong if strict else []


def in_flags(text: str) -> str:
    """What Megatron says of its arguments, by the flags that these have."""
    names = {flag["dest"]: flag["flags"][0] for flag in listed() if "_" in flag["dest"]} | OF_CONFIG
    return re.sub(r"(?<![\w./-])[a-z0-9]+(_[a-z0-9]+)+(?!\w)", lambda found: names.get(found[0], found[0]), text)


def _how(flag: dict[str, Any]) -> dict[str, Any]:
    """What `add_argument` is given."""
    default = flag.get("default")
    if name := BY_ENVIRONMENT.get(flag["dest"]):
        default = int(os.environ.get(name, "1"))
    given = {"dest": flag["dest"], "action": ACTIONS[flag["action"]], "default": default}
    if flag["action"] == "_StoreAction":
        given |= {name: flag[name] for name in ("nargs", "choices") if name in flag}
        given["type"] = TYPES[flag.get("type", "str")]
    return given


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.strip("()").split(","))


def _frequency(text: str) -> int | list[int]:
    """A period; or the list, a number a layer, that an expression such as ([0]+[1]*31) comes to, as Megatron evaluates it."""
    return _listed(ast.parse(text.strip(), mode="eval").body) if "[" in text else int(text)


def _listed(node: ast.expr) -> Any:
    """The value of lists and numbers, added and multiplied.

    Raises:
        ValueError: anything else.
    """
    if isinstance(node, ast.List):
        return [_listed(one) for one in node.elts]
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mult)):
        left, right = _listed(node.left), _listed(node.right)
        return left + right if isinstance(node.op, ast.Add) else left * right
    raise ValueError(f"{ast.unparse(node)} is neither a list nor a number")


TYPES: dict[str, Callable[[str], Any]] = {
    **{"int": int, "float": float, "str": str, "bool": bool},
    "tuple_type": _integers,
    **dict.fromkeys(("moe_freq_type", "no_rope_freq_type", "la_freq_type"), _frequency),
}
"""By the names of Megatron's own. Another than these takes any word."""


def described(made: argparse.ArgumentParser) -> Iterator[dict[str, Any]]:
    """The flags of a parser, as they are listed."""
    for action in made._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        kind = getattr(action.type, "__name__", "str")
        found = {
            "flags": [flag for flag in action.option_strings if not _made_of_another(flag, action)],
            "dest": action.dest,
            "action": type(action).__name__,
            "nargs": action.nargs if action.nargs != 0 else None,
            "type": kind if kind in TYPES and kind != "str" else None,
            "choices": [_plain(choice) for choice in action.choices] if action.choices else None,
            "default": _plain(action.default),
        }
        yield {name: value for name, value in found.items() if value is not None}


def _made_of_another(flag: str, action: argparse.Action) -> bool:
    """Whether argparse adds it itself, as --no-… of --…"""
    return isinstance(action, argparse.BooleanOptionalAction) and bool(re.match("--no-", flag))


def _plain(value: Any) -> Any:
    return value.name if isinstance(value, Enum) else value


if __name__ == "__main__":
    from megatron.training.arguments import add_megatron_arguments

    found = described(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    LIST.write_text("".join(json.dumps(flag) + "\n" for flag in found))
