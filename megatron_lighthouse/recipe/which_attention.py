"""Which attention the layers of a checkpoint have in an evaluation, and had in training. Imports no Megatron. Ours."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_lighthouse.mcore.command_line import settings, stored
from megatron_lighthouse.mcore.command_line.stage import SWITCHES
from megatron_lighthouse.variants import LIGHTHOUSE, VARIANTS

BY_SPEC = ["megatron_lighthouse.mcore.spec", "lighthouse"]
"""As --spec, the same as --attention lighthouse."""


def settle_attention(args: argparse.Namespace, iteration: int) -> None:
    """Make `attention` what the layers do at the checkpoint's iteration: what they select for, where all are dense then.

    Sets `lighthouse_layers`, how many are not, and `dense_by`: the flag, with its value, by which all are dense, else None.
    """
    if args.spec == BY_SPEC:
        args.spec, args.attention = None, LIGHTHOUSE.name
    args.lighthouse_layers, args.dense_by = 0, None
    if VARIANTS[args.attention].selects:
        given, layers = settings.settings_from(args), args.num_layers
        args.lighthouse_layers = given.lighthouse_layers(layers) - given.dense_by_now(layers, iteration)
        if given.schedule and not args.lighthouse_layers:
            args.attention, args.dense_by = given.base.name, given.schedule.because(iteration)
    if not VARIANTS[args.attention].switches:
        vars(args).update(dict.fromkeys(f"lighthouse_{name}" for name in SWITCHES))  # there is nothing to switch


def trained_with(args: argparse.Namespace, iteration: int) -> str | None:
    """The attention that layers of the checkpoint of an iteration had in training, as `settle_attention` names it.

    By the arguments of the job that made it, whatever the command line asks for now; None where these are not known.
    """
    made = (stored.common_state(Path(args.load), iteration) or {}).get("args")
    if getattr(made, "attention", None) not in VARIANTS:
        return None
    made = argparse.Namespace(**{**vars(args), **vars(made)})
    settle_attention(made, iteration)
    return str(made.attention)


def selecting(args: argparse.Namespace) -> list[int]:
    """The iterations of --load of which there is a checkpoint whose layers selected in training."""
    there = sorted(int(path.name.removeprefix("iter_")) for path in Path(args.load).glob("iter_*") if path.name[5:].isdigit())
    return [iteration for iteration in there if (name := trained_with(args, iteration)) and VARIANTS[name].selects]
