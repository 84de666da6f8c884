"""Numbers of eight and four bits: what the words lack, and which GPUs multiply them. Imports no Megatron."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

LEAST = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
"""Of --fp8-recipe, the compute capability from which on Transformer Engine 2.20 multiplies so."""
BLACKWELL, WITHOUT_MXFP8 = (10, 0), (12, 0)


def problems(args: Namespace) -> Iterator[str]:
    """Options that ask for parameters of a format that is not given."""
    for name in ("fp8", "fp4"):
        if getattr(args, f"{name}_param_gather") and not getattr(args, name):
            yield f"--{name}-param-gather is of --{name}-format: add that, or leave it out."


def device_problems(args: Any, major: int, minor: int = 0) -> Iterator[str]:
    """What Transformer Engine refuses in the first step, by the GPUs of the job.

    Args:
        args: as the words say, not validated; or a TransformerConfig.
        major, minor: their compute capability; 0: there are none.
    """
    here, these = (major, minor), f"and these are of {major}.{minor}"
    if not major:
        return
    fits = [name for name in reversed(LEAST) if _multiplies(name, here)]
    if args.fp4 and here < BLACKWELL:
        use = "use --fp8-format hybrid" if fits else "leave it out"
        yield f"--fp4-format {args.fp4} needs Blackwell's GPUs, of compute capability 10, {these}: {use}."
    if not args.fp8:
        return
    recipe = str(getattr(args.fp8_recipe, "value", args.fp8_recipe))
    if not fits:
        yield f"--fp8-format {args.fp8} needs GPUs of compute capability 8.9 or later, {these}: leave it out."
    elif recipe in LEAST and not _multiplies(recipe, here):
        needs = "Blackwell's GPUs, of compute capability 10" if recipe == "mxfp8" else "GPUs of compute capability 9.0 or later"
        use = f"{', '.join(fits[:-1])} or {fits[-1]}"
        yield f"--fp8-recipe {recipe} needs {needs}, {these}: use --fp8-recipe {use}."


def _multiplies(recipe: str, here: tuple[int, int]) -> bool:
    return here >= LEAST[recipe] and not (recipe == "mxfp8" and here >= WITHOUT_MXFP8)
