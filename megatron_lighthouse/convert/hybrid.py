"""Checkpoints of hybrid models whose layers are those of a GPT, each by two symbols: its attention, and its MLP or experts."""

from __future__ import annotations

import re
from argparse import Namespace

from megatron_lighthouse.mcore.command_line.layers import ATTEND, hybrid_pattern, written_pattern

MLP, EXPERTS = "-", "E"
LAYER, FINAL_NORM = re.compile(r"decoder\.layers\.(\d+)\."), "decoder.final_norm."


def pairs(args: Namespace) -> int | None:
    """How many layers a GPT has of them; None where the run's model was no hybrid.

    Raises:
        ValueError: other layers.
    """
    symbols = hybrid_pattern(args)
    if not symbols:
        return None
    if not re.fullmatch(f"([{re.escape(ATTEND)}][{MLP}{EXPERTS}])+", symbols):
        raise ValueError(
            f"the run had {written_pattern(args)[0]} {symbols}, whose layers are no model's that can be exported: only "
            f"attention, each followed by an MLP or experts, such as *{MLP}*{EXPERTS}, can."
        )
    return len(symbols) // 2


def gpt_name(key: str) -> str:
    """Of a tensor of such a model, its name in a GPT: layers are counted by twos."""
    if key.startswith(FINAL_NORM):
        return key.replace(FINAL_NORM, "decoder.final_layernorm.")
    return LAYER.sub(lambda found: f"decoder.layers.{int(found[1]) // 2}.", key)
