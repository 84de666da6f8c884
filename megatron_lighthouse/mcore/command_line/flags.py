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
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from enum import Enum
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from megatron_lighthouse.usage import CHOICE, STRAY, as_sentence, choice_meant, digits_meant, unknown_flag

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


class _Said(argparse.Namespace):
    """Holds what words say, and no default: to argparse all that is missing looks set."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class _UnreadError(Exception):
    """Words that argparse cannot read at all."""


class Collecting(argparse.ArgumentParser):
    """Keeps what is wrong with values, and goes on with what may be meant, or with the flag's default."""

    def __init__(self) -> None:
        super().__init__(allow_abbrev=False, add_help=False)
        self.wrong: list[str] = []
        self.malformed: set[str] = set()

    def _match_argument(self, action: argparse.Action, arg_strings_pattern: str) -> int:
        try:
            return super()._match_argument(action, arg_strings_pattern)
        except argparse.ArgumentError as error:
            self._keep(action, error)
            return 0

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if not arg_strings and action.nargs not in (0, "*", "?"):  # as `_match_argument` has kept
            return action.default
        words = [*arg_strings]
        while True:
            try:
                return super()._get_values(action, words)
            except argparse.ArgumentError as error:
                message, none_of = str(error), CHOICE.search(str(error))
                word = none_of["word"] if none_of else message.rpartition(": ")[2].strip("'")
                choice = choice_meant(message, action.choices)
                meant = choice or digits_meant(message)
                self._keep(action, error, guessed=meant is not None, hint=f" Did you mean {choice}?" if choice else "")
                if meant is None:
                    return action.default
                words[words.index(word)] = meant

    def error(self, message: str) -> NoReturn:
        """What argparse says of a whole command line: nothing of it is read."""
        self.wrong.append(as_sentence(message))
        raise _UnreadError

    def _keep(self, action: argparse.Action, error: argparse.ArgumentError, guessed: bool = False, hint: str = "") -> None:
        rule = LISTS.get(action.type)
        word = str(error).partition(" value: ")[2].strip("'")
        said = f"{action.option_strings[0]} {word} must be {rule}." if rule and word else as_sentence(str(error))
        self.wrong.append(said + hint)
        self.malformed |= set() if guessed else {*action.option_strings}

    def without_values(self, words: Iterable[str]) -> Iterator[str]:
        """The words, of which switches have no value: argparse would end with that error alone."""
        for word in words:
            flag, equals, value = word.partition("=")
            action = self._option_string_actions.get(flag) if equals else None
            if action is not None and action.nargs == 0:
                self.wrong.append(f"{flag} takes no value: leave ={value} out.")
                word = flag
            yield word

    def with_equals(self, words: Iterable[str]) -> Iterator[str]:
        """The words, of which a value that begins with a dash is joined to its flag: argparse takes it for a flag."""
        before: str | None = None
        for word in words:
            if before is not None and self._hidden(before, word):
                self.wrong.append(f"{before} {word}: a value that begins with - follows an equals sign: write {before}={word}.")
                word, before = f"{before}={word}", None
            if before is not None:
                yield before
            before = word
        if before is not None:
            yield before

    def _hidden(self, flag: str, word: str) -> bool:
        action = self._option_string_actions.get(flag)
        if action is None or action.nargs is not None or not word.startswith("-") or re.match("-$|--$|--[a-z]|.* ", word):
            return False  # with a space argparse takes it for a value
        return not self._negative_number_matcher.match(word)


def parser(add_arguments: Add) -> Collecting:
    """A parser of Megatron's flags, and of what `add_arguments` adds."""
    made = Collecting()
    for flag in listed():
        made.add_argument(*flag["flags"], **_how(flag))
    add_arguments(made)
    return made


def parse(given: Sequence[str], add_arguments: Add, strict: bool = True) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and all that is wrong with the words, each in a sentence.

    A value that its flag does not take hides nothing: the argument is what may be meant, as 2048 by 2k, or else the default,
    and its flag in the arguments' `malformed` (`apart`). Their `said` holds the names of those that the words give, be it their
    default.

    Args:
        given: the words.
        strict: whether a flag that is not listed is wrong: a Megatron of another release may know it.
    """
    made = parser(add_arguments)
    words = [*made.with_equals(made.without_values(word for word in given if word != STRAY))]
    try:
        args, rest = made.parse_known_args(words)
    except _UnreadError:
        words, (args, rest) = [], made.parse_known_args([])
    wrong = [*([unknown_flag(STRAY, {})] if STRAY in given else ()), *made.wrong]
    args.malformed = frozenset(made.malformed)
    args.said = frozenset(vars(made.parse_known_args(words, _Said())[0]))
    if strict:
        unknown = [unknown_flag(word, made._option_string_actions) for word in rest if word.startswith("-")]
        wrong += unknown or ([f"{' '.join(rest)} follows no flag that takes it: leave it out."] if rest else [])
    return args, wrong


def apart(problems: Iterable[str], malformed: Collection[str]) -> list[str]:
    """Those of the problems that name no flag whose value was not read: with the right value there may be none."""
    named = re.compile(rf"(?<![\w-])({'|'.join(map(re.escape, malformed)) or '$^'})(?![\w-])")
    return [problem for problem in problems if not named.search(problem)]


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
    try:
        return _listed(ast.parse(text.strip(), mode="eval").body) if "[" in text else int(text)
    except SyntaxError as error:
        raise ValueError(text) from error


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
LISTS: dict[Any, str] = {
    _integers: "whole numbers apart by commas, such as 128,0",
    _frequency: "a whole number N, of each N-th layer, or a list of one number a layer, such as [1,0,1,0]",
}
"""What a word must be, of types whose names say nothing."""


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
