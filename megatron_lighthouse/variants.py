"""The attentions that `--attention` names. This file alone lists them; docs/add_an_attention.md says how one is added."""

from __future__ import annotations

from typing import Any

from megatron_lighthouse.lighthouse.variant import LIGHTHOUSE
from megatron_lighthouse.parallax.variant import PARALLAX
from megatron_lighthouse.softmax.variant import DENSE
from megatron_lighthouse.variant import Stream, Variant
from megatron_lighthouse.wall.variant import WALL

__all__ = [
    "DENSE",
    "LIGHTHOUSE",
    "PARALLAX",
    "VARIANTS",
    "WALL",
    "base_in",
    "counted",
    "named_in",
    "register",
    "streams_in",
    "switching",
]

VARIANTS: dict[str, Variant] = {}
"""By name, in the order in which they are listed."""


def register(variant: Variant) -> None:
    """Add an attention to those that can be named."""
    VARIANTS[variant.name] = variant


register(DENSE)
register(LIGHTHOUSE)
register(PARALLAX)
register(WALL)


def base_in(args: Any) -> Variant | None:
    """What the layers of a run are where they do not select, by its arguments; None of an attention that is not known here.

    Args:
        args: Megatron's, or those of a checkpoint; dense where they name no attention.
    """
    variant = VARIANTS.get(getattr(args, "attention", None) or DENSE.name)
    return None if variant is None else variant.base_in(args)


def named_in(args: Any) -> str:
    """Behind `--attention`, what says which attention a run has."""
    variant, base = VARIANTS[args.attention], base_in(args)
    of = "" if base is None or base is variant or base.native else f" --{variant.name}-around {base.around}"
    return f"{args.attention}{of}"


def streams_in(args: Any) -> tuple[Stream, ...]:
    """The streams of all layers of a run, by its arguments; none of an attention that is not known here."""
    base = base_in(args)
    return () if base is None else base.streams


def switching() -> str:
    """The flags of those whose layers may become dense, for messages."""
    return " or ".join(f"--attention {variant.name}" for variant in VARIANTS.values() if variant.switches)


def counted() -> list[str]:
    """The names of those that the plan knows."""
    return [variant.name for variant in VARIANTS.values() if variant.counted]
