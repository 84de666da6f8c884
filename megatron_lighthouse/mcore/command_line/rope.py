"""Where pooled rows stand among rotary positions, and which of the two ways a run takes. Imports no Megatron.

A checkpoint goes on as it was trained: its own argument wins. One that holds none is older than the argument: `mean`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_lighthouse.lighthouse.config import flag
from megatron_lighthouse.mcore.command_line import stored
from megatron_lighthouse.notice import say_once
from megatron_lighthouse.variants import VARIANTS

if TYPE_CHECKING:
    from megatron_lighthouse.mcore.command_line.settings import LighthouseSettings

LAST, MEAN = "last", "mean"
ROPES = (LAST, MEAN)
FLAG = flag("rope")


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """Add `--lighthouse-rope` to the arguments of Lighthouse."""
    group.add_argument(
        FLAG,
        choices=ROPES,
        default=LAST,
        help="The rotary position of a pooled query or key: that of its window's 'last' token, as the authors' code has it "
        "since July 2026, or the 'mean' of its rotated tokens, the paper's text. What goes on from a checkpoint takes the "
        "checkpoint's. Default: %(default)s.",
    )


def rope_problems(position_embedding_type: str | None) -> Iterator[str]:
    """Why a model does not say one angle a token and channel."""
    if position_embedding_type == "mrope":
        yield (
            f"--position-embedding-type mrope rotates by three positions a token, of which {FLAG} last would need each: use "
            f"{FLAG} mean, or --position-embedding-type rope."
        )


def rotary_option(settings: LighthouseSettings) -> str | None:
    """The option by which layers must know what the model rotates queries and keys by; None where they need not."""
    if settings.attention.selects and settings.rope == LAST:
        return f"{FLAG} {LAST}"
    return settings.base.rotary_option(settings.base_config)


def last_problems(settings: LighthouseSettings) -> Iterator[str]:
    """Why pooled rows of a model with RoPE cannot stand at their window's last token."""
    base = settings.base
    if settings.attention.selects and settings.rope == LAST and base.rotary_problem():
        yield f"{FLAG} {LAST} turns pooled rows, and with {flag('around')} {base.around} they fade instead: use {FLAG} {MEAN}."


def settled(args: argparse.Namespace, settings: LighthouseSettings) -> LighthouseSettings:
    """`settings` with the way that the run takes, said where the command line asks for another. Its checkpoints hold it too.

    Args:
        args: Megatron's.
    """
    settings, said = taken(args, settings)
    args.lighthouse_rope = settings.rope
    if said:
        say_once(f"lighthouse: {said}")
    return settings


def taken(args: argparse.Namespace, settings: LighthouseSettings) -> tuple[LighthouseSettings, str | None]:
    """`settings` with the way that the run takes, and what to say of it."""
    way, said = choice(args, settings.rope, *stored.folders(args))
    return replace(settings, rope=way), said


def keep(args: argparse.Namespace) -> None:
    """As `settled`, of a run without Lighthouse, which hands on what its checkpoint says."""
    args.lighthouse_rope, _ = choice(args, args.lighthouse_rope, *stored.folders(args))


def choice(args: argparse.Namespace, asked: str, load: Path | None, pretrained: Path | None = None) -> tuple[str, str | None]:
    """The way that a run takes, and what to say of it.

    Args:
        args: Megatron's, validated or not.
        asked: what the command line says, or would if it said anything.
        load, pretrained: --load and --pretrained-checkpoint, where this machine has them.
    """
    found = stored.before(args, load, pretrained)
    if found is None:
        return asked, None
    load, before, begins = found.folder, found.args, found.begins
    if before is None and not found.state:
        return asked, f"the checkpoint in {load} does not say how it was trained: {FLAG} {asked} is taken"
    was, how = getattr(before, "lighthouse_rope", MEAN), f"the checkpoint in {load} was trained with it"
    if not hasattr(before, "lighthouse_rope"):
        how = f"the checkpoint in {load} was trained with it, being older than the argument"
    if was == asked:
        return asked, None
    if not begins:
        return was, f"{FLAG} {was} is taken: {how}. For {FLAG} {asked} begin anew, with --finetune or --pretrained-checkpoint"
    other = getattr(VARIANTS.get(getattr(before, "attention", "")), "selects", False)
    return asked, f"{FLAG} {asked} is taken for a new run, and not {was}: {how}" if other else None


def loaded_problem(args: argparse.Namespace, before: Any, folder: str) -> str | None:
    """Why a run does not go on from a checkpoint that it sees first when it is loaded, as one of an object store.

    A run without Lighthouse takes the checkpoint's way here, to hand it on.

    Args:
        before: the checkpoint's arguments; None where it has none.
    """
    took, was = getattr(args, "lighthouse_rope", None), getattr(before, "lighthouse_rope", MEAN)
    if before is None or took in (None, was) or args.finetune:
        return None
    if args.attention in VARIANTS and VARIANTS[args.attention].selects:
        return f"the checkpoint in {folder} was trained with {FLAG} {was}, and the run began with {took}: add {FLAG} {was}."
    args.lighthouse_rope = was
    return None
