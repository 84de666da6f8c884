"""Which scorer `--lighthouse-scorer auto` is: that of the checkpoint that goes on, else what the model asks for.

Imports no Megatron.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_lighthouse.lighthouse.config import AUTO, flag
from megatron_lighthouse.lighthouse.scorers import SCORERS
from megatron_lighthouse.mcore.command_line import stored

FLAG = flag("scorer")
PLAIN, NORMED = "norm", "mass"
NORMS = {"qk_layernorm": "--qk-layernorm", "qk_l2_norm": "--qk-l2-norm"}
"""Options of a model that leave queries and keys nearly equally long."""


def of_model(model: Any) -> str:
    """The scorer for a model, of Megatron's arguments or a TransformerConfig."""
    return NORMED if normed_by(model) else PLAIN


def normed_by(model: Any) -> list[str]:
    """The flags by which a model norms its queries and keys; MLA norms latents, which leaves these as long as they are."""
    if getattr(model, "multi_latent_attention", False):
        return []
    return [option for name, option in NORMS.items() if getattr(model, name, False)]


def choice(args: argparse.Namespace, load: Path | None, pretrained: Path | None = None) -> tuple[str, str | None]:
    """The scorer that a run takes, and what to say of it; nothing where the command line names it.

    Args:
        args: Megatron's, validated or not.
        load, pretrained: --load and --pretrained-checkpoint, where this machine has them.

    A checkpoint that goes on keeps its own, but for one that goes by length where queries and keys are normed: no Lighthouse
    run has trained so, and dense ones hold it as the default of older releases.
    """
    if args.lighthouse_scorer != AUTO:
        return args.lighthouse_scorer, None
    model, before = of_model(args), stored.before(args, load, pretrained)
    was = None if before is None or before.begins else getattr(before.args, "lighthouse_scorer", None)
    if was in (None, AUTO, model) or (was in SCORERS and SCORERS[was].by_length and model == NORMED):
        why = f", for {' and '.join(normed)} makes queries and keys equally long" if (normed := normed_by(args)) else ""
        return model, f"{FLAG} {model} taken{why}"
    assert before is not None
    return was, f"{FLAG} {was} taken as the checkpoint in {before.folder} was trained"
