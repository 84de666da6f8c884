"""The attentions that `--attention` names. This file alone lists them; docs/add_an_attention.md says how one is added."""

from __future__ import annotations

from megatron_lighthouse.lighthouse.variant import LIGHTHOUSE
from megatron_lighthouse.parallax.variant import PARALLAX
from megatron_lighthouse.softmax.variant import DENSE
from megatron_lighthouse.variant import Variant
from megatron_lighthouse.wall.variant import WALL

__all__ = ["DENSE", "LIGHTHOUSE", "PARALLAX", "VARIANTS", "WALL", "counted", "register", "switching"]

VARIANTS: dict[str, Variant] = {}
"""By name, in the order in which they are listed."""


def register(variant: Variant) -> None:
    """Add an attention to those that can be named."""
    VARIANTS[variant.name] = variant


register(DENSE)
register(LIGHTHOUSE)
register(PARALLAX)
register(WALL)


def switching() -> str:
    """The flags of those whose layers may become dense, for messages."""
    return " or ".join(f"--attention {variant.name}" for variant in VARIANTS.values() if variant.switches)


def counted() -> list[str]:
    """The names of those that the plan knows."""
    return [variant.name for variant in VARIANTS.values() if variant.counted]
