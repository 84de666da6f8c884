"""Whether selections are causal where the command line does not say: as in the checkpoint that goes on. Imports no Megatron."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_lighthouse.lighthouse.config import flag
from megatron_lighthouse.mcore.command_line import stored

FLAG = flag("causal_selection")


def choice(args: argparse.Namespace, load: Path | None, pretrained: Path | None = None) -> tuple[bool, str | None]:
    """Whether a run's selections are causal, and what to say of it; nothing where the command line says it.

    Args:
        args: Megatron's, validated or not.
        load, pretrained: --load and --pretrained-checkpoint, where this machine has them.
    """
    if args.lighthouse_causal_selection is not None:
        return args.lighthouse_causal_selection, None
    before = stored.before(args, load, pretrained)
    if before is None or before.begins or not getattr(before.args, "lighthouse_causal_selection", False):
        return False, None
    return True, f"{FLAG} taken as the checkpoint in {before.folder} was trained"
