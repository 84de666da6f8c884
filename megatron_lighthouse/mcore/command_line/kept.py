"""A run's arguments, in a file beside its checkpoints and its log, from which `--run-folder` takes them. Imports no Megatron.

    {"arguments": ["--attention", "lighthouse", …],    as given, paths as they are from anywhere
     "ranks": 8, "version": "0.1.0"}                   processes, and release of this package

Each start writes it anew, so that it is the last job's.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_lighthouse.lighthouse.config import flag as lighthouse_flag
from megatron_lighthouse.mcore.command_line.stage import SWITCHES
from megatron_lighthouse.variants import VARIANTS

RUN = "--run-folder"
"""Not --run: the argparse of Python 3.12.1, by which torchrun reads the line, finds it ambiguous: --run-path or --run_path."""
NAME = "arguments.json"
PLACES = ("", "checkpoints", "tensorboard")
"""In a run's folder, where the file may be."""
FOLDERS = ("--save", "--tensorboard-dir", "--data-cache-path", "--wandb-save-dir")
"""What a run makes where it is not there."""
WRITTEN = (*FOLDERS, "--load", "--lighthouse-selection-map")
"""Paths, whether they exist or not."""
READ = """
    --text-data --data-path --train-data-path --valid-data-path --test-data-path --data-args-path --per-split-data-args-path
    --tokenizer-model --vocab-file --merge-file --metadata-path --pretrained-checkpoint --heterogeneous-layers-config-path
    --result-rejected-tracker-filename --quant-recipe --te-precision-config-file
""".split()
"""Words that are paths where there is such a file, folder, or dataset of that prefix."""
ONCE = ("--finetune", "--no-load-optim", "--no-load-rng", "--ckpt-step", "--pretrained-checkpoint", "--override-ckpt-iteration")
"""How a run began, which is not how it goes on."""


def options(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """A command line by its options: each flag and the words that follow it."""
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            found.append((flag, [value] if equals else []))
        elif found:
            found[-1][1].append(word)
    yield from found


def words(given: Iterable[tuple[str, list[str]]]) -> list[str]:
    """What `options` takes apart."""
    return [word for flag, values in given for word in (flag, *values)]


def value(given: Sequence[str], flag: str) -> str | None:
    """The last value of a flag in a command line."""
    return next((values[0] for name, values in reversed([*options(given)]) if name == flag and values), None)


def keep(args: argparse.Namespace, given: Sequence[str]) -> None:
    """Write the file beside checkpoints and log, where the run has such; on rank 0, before it trains.

    Args:
        args: Megatron's.
        given: the command line.

    Raises:
        OSError: a folder that cannot be written to.
    """
    if args.rank or args.skip_train:
        return
    content = {"arguments": words(_absolute(options(given))), "ranks": args.world_size, "version": _version()}
    for folder in {args.save, args.tensorboard_dir} - {None}:
        if "://" not in folder:
            path = Path(folder) / NAME
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{NAME}.partial")
            partial.write_text(json.dumps(content, indent=1) + "\n")
            partial.replace(path)


def _absolute(given: Iterable[tuple[str, list[str]]]) -> Iterator[tuple[str, list[str]]]:
    for flag, values in given:
        if flag in WRITTEN:
            values = [v if "://" in v else os.path.abspath(v) for v in values]
        elif flag in READ:
            values = [os.path.abspath(v) if os.path.exists(v) or os.path.exists(f"{v}.idx") else v for v in values]
        yield flag, values


def _version() -> str:
    import megatron_lighthouse

    return megatron_lighthouse.__version__


def read(folder: Path) -> list[str]:
    """The arguments in a run's folder, or in that of its checkpoints or log.

    Raises:
        ValueError: no file there, or none that can be read.
    """
    found = [path for place in PLACES if (path := folder / place / NAME).is_file()]
    if not found:
        raise ValueError(
            f"{RUN} {folder} has no {NAME}, in it or in its {' or '.join(PLACES[1:])}: name the folder of a run that was begun "
            "by this version with --save or --tensorboard-dir, or give its arguments in full."
        )
    try:
        content: Any = json.loads(found[0].read_text())["arguments"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{RUN} {folder}: {found[0]} cannot be read ({error}): give the run's arguments in full.") from None
    return [str(word) for word in content]


def of_run(given: Sequence[str], here: Callable[[str], Path] = Path) -> tuple[list[str], list[str]]:
    """The arguments of the run that `--run-folder` names, none where it is not given; and the command line without it.

    Args:
        here: where a folder of the command line is on this machine.

    Raises:
        ValueError: as `read`, or --run-folder without a folder, or with several, or --run.
    """
    if value(given, "--run"):
        raise ValueError(f"--run is not a flag here, for torchrun may take it for its own --run-path: use {RUN}.")
    runs = [values for flag, values in options(given) if flag == RUN]
    if not runs:
        return [], [*given]
    if len(runs) > 1 or len(runs[0]) != 1:
        raise ValueError(f"{RUN} {' '.join(runs[-1])}: give one folder, that of a run.")
    first = next(i for i, word in enumerate(given) if word.partition("=")[0] == RUN)
    return read(here(runs[0][0])), [*given[:first], *given[first + (1 if "=" in given[first] else 2) :]]


def resumed(given: Sequence[str], here: Callable[[str], Path] = Path) -> list[str]:
    """A command line of the entry point, with the arguments of `--run-folder` before its own; it goes on from its checkpoint.

    Less those of how it began, and less switches of a run that goes on with an attention that has none, as stage 2 does.

    Args:
        here: as in `of_run`.

    Raises:
        ValueError: as `of_run`.
    """
    before, own = of_run(given, here)
    if not before:
        return own
    save, spec = (value([*before, *own], flag) for flag in ("--save", "--spec"))  # a spec brings layers that switch, too
    now = None if spec else VARIANTS.get(value(own, "--attention") or "")
    left = ONCE if now is None or now.switches else (*ONCE, *map(lighthouse_flag, SWITCHES))
    kept = words((flag, values) for flag, values in options(before) if flag not in left)
    return [*kept, *(["--load", save] if save else []), *own]


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Name `--run-folder` in the help; `of_run` takes it out of the command line before it is parsed."""
    parser.add_argument_group("an earlier run").add_argument(
        RUN,
        metavar="FOLDER",
        help=f"Take the arguments of the run in this folder ({NAME} beside its checkpoints or log), and go on from its last "
        "checkpoint; what else is given comes after them, and wins.",
    )
    return parser
