"""The command line of the entry point: what it takes, and all that it refuses. Imports no Megatron at module level.

The run asks it of what Megatron has parsed; so does the check before a job is queued.
"""

from __future__ import annotations

import argparse
from typing import Any

from megatron_lighthouse.mcore.command_line import fp8, graphs, kept, tiles
from megatron_lighthouse.mcore.command_line.arguments import model_config, use_attention, with_lighthouse_arguments
from megatron_lighthouse.mcore.command_line.from_checkpoint import explained
from megatron_lighthouse.mcore.command_line.resume import check_resume
from megatron_lighthouse.mcore.command_line.run_options import missing_packages, problems
from megatron_lighthouse.mcore.data import text
from megatron_lighthouse.mcore.loop import selection_log
from megatron_lighthouse.usage import one_line

LAYER = "{layer}"
"""In the name of a picture: the layer's number."""


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add what the entry point takes beside Lighthouse's arguments, and have errors take one line."""
    group = text.add_arguments(parser).add_argument_group("pictures")
    group.add_argument(
        "--lighthouse-selection-map",
        metavar="PNG",
        help=f"When training ends, draw what the first Lighthouse layer selected in its last batch; with {LAYER} in the file's "
        f"name, one picture for each of {selection_log.LAYERS}.",
    )
    tiles.add_arguments(parser)
    graphs.add_arguments(parser)
    fp8.add_arguments(parser)
    kept.add_arguments(parser)
    repair_help(parser)
    if type(parser) is argparse.ArgumentParser:  # Megatron's, whose usage is four thousand lines
        parser.error = lambda message: one_line(parser, message)  # type: ignore[method-assign]
    return parser


def with_all_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add all that the entry point takes beside Megatron's own."""
    return with_lighthouse_arguments(add_arguments)(parser)


def repair_help(parser: argparse.ArgumentParser) -> None:
    """Escape the per cent signs in Megatron's help texts: 0.19 leaves one bare, and its --help raises ValueError."""
    for action in parser._actions:
        try:
            (action.help or "") % {**vars(action), "prog": parser.prog}
        except (ValueError, TypeError, KeyError):
            action.help = (action.help or "").replace("%", "%%")


def checked_model(args: argparse.Namespace, packages: bool = True) -> Any:
    """Megatron's GPTModelConfig of the run, once nothing of its command line is refused.

    Args:
        args: Megatron's, validated.
        packages: whether to refuse what this Python lacks a package for; another may be the run's.

    Raises:
        ValueError: what is refused, and what works.
    """
    with explained(args, with_all_arguments):
        if found := [*problems(args), *(missing_packages(args) if packages else ())]:
            raise ValueError("\n".join(found))
        check_resume(args)
        return use_attention(args, model_config(args))
