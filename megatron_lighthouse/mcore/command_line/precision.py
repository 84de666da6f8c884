"""Numbers of eight and four bits: what the words lack, and which GPUs multiply them. Imports no Megatron."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

HOPPER, BLACKWELL = 9, 10
"""Major compute capabilities."""


def problems(args: Namespace) -> Iterator[str]:
    """Options that ask for parameters of a format that is not given."""
    for name in ("fp8", "fp4"):
        if getattr(args, f"{name}_param_gather") and not getattr(args, name):
            yield f"--{name}-param-gather is of --{name}-format: add that, or leave it out."


def device_problems(args: Namespace, major: int) -> Iterator[str]:
    """What Transformer Engine refuses in the first step, by the GPUs of the job.

    Args:
        args: as the words say, not validated.
        major: their compute capability; 0: there are none.
    """
    if not 0 < major < BLACKWELL:
        return
    if args.fp4:
        yield f"--fp4-format {args.fp4} needs Blackwell's GPUs, of compute capability {BLACKWELL}: use --fp8-format hybrid."
    if args.fp8 and args.fp8_recipe == "mxfp8":
        yield (
            f"--fp8-recipe mxfp8 needs Blackwell's GPUs, of compute capability {BLACKWELL}: use --fp8-recipe blockwise, "
            "tensorwise or delayed."
        )
