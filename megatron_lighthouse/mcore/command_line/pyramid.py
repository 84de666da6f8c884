"""Levels and budgets where the command line leaves them open: those of the checkpoint that goes on, else the length's.

The scorer is settled with them (`scorer`), and whether selections are causal (`causal`). Imports no Megatron.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_lighthouse.lighthouse.by_length import NAMES, TILE, by_length
from megatron_lighthouse.lighthouse.config import LighthouseConfig, flag
from megatron_lighthouse.mcore.command_line import causal, documents, scorer, stored
from megatron_lighthouse.notice import say_once
from megatron_lighthouse.variants import VARIANTS


def sizes(args: argparse.Namespace, seq_length: int | None) -> dict[str, int]:
    """The arguments of Lighthouse that `args` leave open (None), as the length has them. Empty where no length is known."""
    given = {name: getattr(args, _dest(name)) for name in NAMES}
    if seq_length is None or None not in given.values():
        return {}
    if documents.asked(args) and given["tile_budget"] is None:  # what divides a row is nothing to its documents
        given["tile_budget"] = TILE
    found = by_length(seq_length, args.lighthouse_pooling, **given)
    return {_dest(name): found[name] for name in NAMES if getattr(args, _dest(name)) is None}


def settle(args: argparse.Namespace) -> None:
    """Give `args`, Megatron's, what they leave open, and say so. Checkpoints hold it, of dense runs too.

    Raises:
        ValueError: a budget of one sequence, where rows hold packed documents.
    """
    if not getattr(args, "sizes_settled", False) and (problems := [*budget_problems(args)]):
        raise ValueError("\n".join(problems))
    args.sizes_settled = True  # an evaluation asks again, and no size is open then
    found, said = choice(args, *stored.folders(args))
    args.lighthouse_scorer, ranks = scorer.choice(args, *stored.folders(args))
    args.lighthouse_causal_selection, looks = causal.choice(args, *stored.folders(args))
    vars(args).update(found)
    if (said or ranks or looks) and _may_select(args):
        say_once(f"lighthouse: {'; '.join(filter(None, (said, ranks, looks)))}")


def budget_problems(args: argparse.Namespace) -> Iterator[str]:
    """Budgets of one sequence, as the command line gives them, where rows hold documents: a document's goes by its own length.

    Args:
        args: before budgets that are not given follow the sequence length.
    """
    if not (documents.asked(args) and _may_select(args)):
        return
    for name in ("budget", "edge_budget"):
        if (given := getattr(args, _dest(name))) is not None:
            yield (
                f"{flag(name)} {given} is of one sequence, and with {documents.flag_of(args)} each document has its own, by "
                "its length: leave it out, and use --lighthouse-tile-budget and --lighthouse-document-tile."
            )


def choice(args: argparse.Namespace, load: Path | None, pretrained: Path | None = None) -> tuple[dict[str, int], str | None]:
    """What a run takes for the arguments that are open, and what to say of it.

    Args:
        args: Megatron's, validated or not.
        load, pretrained: --load and --pretrained-checkpoint, where this machine has them.

    A checkpoint that goes on at its own length keeps what it was trained with. At another length, with other levels, pooling or
    budgets given, or where what it says does not fit (as an older dense run's), the length decides.
    """
    found = sizes(args, args.seq_length)
    if not found:
        return {}, None
    before = stored.before(args, load, pretrained)
    if before and not before.begins and before.args is not None and not _changed(args, before.args):
        kept = {name: getattr(before.args, name) for name in found}
        differs = kept != found
        return kept, f"{_words(kept)} as the checkpoint in {before.folder} was trained" if differs else None
    return found, f"{_words(found)} for {args.seq_length} tokens"


def _changed(args: argparse.Namespace, before: Any) -> bool:
    """Whether the checkpoint's pyramid is another than what is asked for, or is not known."""
    names = ["seq_length", "lighthouse_pooling", *map(_dest, NAMES)]
    pairs = [(getattr(args, name), getattr(before, name, None)) for name in names]
    if any(was is None or now not in (None, was) for now, was in pairs):
        return True
    try:
        config = {name: getattr(before, _dest(name)) for name in NAMES}
        LighthouseConfig(pooling=args.lighthouse_pooling, **config).geometry(args.seq_length)
    except ValueError:
        return True
    return False


def _may_select(args: argparse.Namespace) -> bool:
    """Whether layers may select; a run whose layers do not hands its sizes on in its checkpoints."""
    return VARIANTS[args.attention].selects or getattr(args, "spec", None) is not None


def _words(found: dict[str, int]) -> str:
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in found.items()) + " taken"


def _dest(name: str) -> str:
    return flag(name)[2:].replace("-", "_")
