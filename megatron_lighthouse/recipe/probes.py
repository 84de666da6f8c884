"""All retrieval probes: their arguments, the questions that these ask for, and a model's answers."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

import numpy

from megatron_lighthouse.mcore.command_line.documents import asked
from megatron_lighthouse.recipe import passkey, variables
from megatron_lighthouse.recipe.probe import CHANCE, FILLERS, Encode, Grid, Probe, bytes_of, statistics, unbalanced
from megatron_lighthouse.recipe.refused import raise_all
from megatron_lighthouse.variants import VARIANTS

if TYPE_CHECKING:
    from megatron_lighthouse.recipe.trained import Trained

type Array = numpy.ndarray[Any, Any]
PROBES = (passkey.PROBE, variables.PROBE)


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """The flags of all."""
    for probe in PROBES:
        flag, axis, add = f"--{probe.name}", probe.axis, group.add_argument
        given = " ".join(f"{value:g}" for value in axis.values)
        count = f"Questions of {probe.title} a cell, best a multiple of ten; 0 for none. Default: {probe.samples}."
        add(f"{flag}-samples", type=int, default=probe.samples, help=count)
        add(f"{flag}-lengths", type=int, nargs="+", help="Context lengths. Default: --seq-length and its 1/2, 1/4 and 1/8.")
        add(f"{flag}-{axis.flag}", type=axis.kind, nargs="+", default=axis.values, help=f"{axis.help}. Default: {given}.")
        add(f"{flag}-fillers", nargs="+", choices=FILLERS, default=FILLERS, help="Default: both.")
        add(f"{flag}-seed", type=int, default=1234, help="Of the questions. Default: 1234.")


def of(probe: Probe, args: argparse.Namespace, what: str) -> Any:
    """The value of --PROBE-WHAT."""
    return getattr(args, f"{probe.name}_{what}")


def asked_for(args: argparse.Namespace) -> list[Probe]:
    """Those with questions."""
    return [probe for probe in PROBES if of(probe, args, "samples")]


def grid_of(probe: Probe, args: argparse.Namespace, tokens: int, encode: Encode = bytes_of) -> tuple[Grid, list[str]]:
    """The questions that `args` ask for, and what to say of them.

    Raises:
        ValueError: lengths, values or samples that cannot be, or a tokenizer by which the probe cannot be asked.
    """
    values, samples, fillers, seed = (of(probe, args, what) for what in (probe.axis.flag, "samples", "fillers", "seed"))
    lengths, words, said = of(probe, args, "lengths"), probe.words(encode), []
    if not lengths:
        shorter = [n for n in (args.seq_length // part for part in (8, 4, 2)) if n >= words.shortest(max(values))]
        lengths = [*(n for n in shorter if not _misfit(args, n)), args.seq_length]
        if left_out := [n for n in shorter if n not in lengths]:
            said.append(f"no {probe.title} in {', '.join(map(str, left_out))} tokens: {_misfit(args, left_out[0])}")
    grid = Grid(probe, words, lengths, values, samples, fillers, seed)
    misfits = (f"--{probe.name}-lengths {length} {problem}" for length in lengths if (problem := _misfit(args, length)))
    raise_all([*grid.problems(tokens), *misfits])
    return grid, said + ([uneven] if (uneven := unbalanced(probe, samples)) else [])


def _misfit(args: argparse.Namespace, length: int) -> str | None:
    """Why the model cannot read so many tokens; None where it can."""
    multiple = args.tensor_model_parallel_size if args.sequence_parallel else 1
    if length > args.seq_length or length % multiple:
        more = f" and a multiple of --tensor-model-parallel-size {multiple}" if multiple > 1 else ""
        return f"must be at most --seq-length {args.seq_length}{more}."
    if not VARIANTS[args.attention].native and not asked(args):  # a document may have any length
        from megatron_lighthouse.mcore.command_line.lengths import settings_problems
        from megatron_lighthouse.mcore.command_line.settings import settings_from

        for problem in settings_problems(settings_from(args), length, 1):
            return f"with --attention {args.attention}: {problem}"
    return None


def text_for(args: argparse.Namespace, tokens: Array, end: int | None) -> Array:
    """The held-out text that fillers are cut from: where documents are told apart, without their ends, to be one of them."""
    return tokens[tokens != end] if asked(args) else tokens


def answers(grid: Grid, trained: Trained, tokens: Array) -> dict[str, Any]:
    """Accuracy and log-probability by question, by cell and by filler. Every rank calls it."""
    from megatron_lighthouse.recipe.trained import over_ranks

    questions = grid.questions()
    text = text_for(trained.args, tokens, trained.reader.end)

    def compute(index: int) -> tuple[float, float]:
        return grid.answer(questions[index], text, trained.next_token)

    found = over_ranks(len(questions), 2, compute, grid.probe.title)
    fillers = found.reshape(len(grid.fillers), -1, 2)
    return {
        "chance": CHANCE,
        "greatest_standard_error_of_a_cell": 0.5 / math.sqrt(grid.samples),
        "seed": grid.seed,
        "fillers": {name: statistics(part) for name, part in zip(grid.fillers, fillers, strict=True)},
        "cells": grid.by_cell(found),
        "questions": grid.by_question(found),
    }
