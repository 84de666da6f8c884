"""What `--use-checkpoint-args` takes from a checkpoint before what the command line says: refusals say so."""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

Parser = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]


class _Recorded(argparse.Namespace):
    """Arguments that keep the names of those that are set."""

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__.setdefault("_set", set()).add(name)
        super().__setattr__(name, value)


def forced(args: argparse.Namespace) -> set[str]:
    """Names of the arguments that Megatron takes from the checkpoint of `args` whatever the command line says.

    Args:
        args: Megatron's, once it has taken them: where one is still None, the command line would be heeded.
    """
    from megatron.training.checkpointing import load_args_from_checkpoint

    if not getattr(args, "use_checkpoint_args", False):
        return set()
    copy = _Recorded()
    copy.__dict__.update(vars(args))
    with redirect_stdout(io.StringIO()):  # it prints each
        for where in ("pretrained_checkpoint", "load"):
            load_args_from_checkpoint(copy, load_arg=where)
    return set(copy.__dict__.get("_set", ()))


@contextmanager
def explained(args: argparse.Namespace, add_arguments: Parser) -> Iterator[None]:
    """Add to a refusal which of the options that it names are the checkpoint's.

    Args:
        args: as in `forced`.
        add_arguments: what the parser was extended by.
    """
    try:
        yield
    except ValueError as error:
        lines = [*_explanations(str(error), args, add_arguments)]
        if not lines:
            raise
        raise ValueError("\n".join([str(error), *lines])) from error


def _explanations(message: str, args: argparse.Namespace, add_arguments: Parser) -> Iterator[str]:
    from megatron.training.arguments import add_megatron_arguments

    named = {word.rstrip(".,:;)").lstrip("(") for word in message.split()}
    taken = forced(args)
    for action in add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))._actions:
        if action.dest in taken and (flags := [flag for flag in action.option_strings if flag in named]):
            yield (
                f"{flags[0]} is the checkpoint's ({_shown(getattr(args, action.dest))}), which --use-checkpoint-args takes "
                "whatever the command line says: to give another value, leave --use-checkpoint-args out and give all arguments "
                "of the model."
            )


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
