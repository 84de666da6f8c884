"""The attentions of a run by what its command line calls them, and the options of those that it does not name."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

from megatron_lighthouse.lighthouse.config import flag
from megatron_lighthouse.mcore.command_line.settings import LighthouseSettings
from megatron_lighthouse.options import set_options
from megatron_lighthouse.variant import Variant
from megatron_lighthouse.variants import VARIANTS


def asked_by(variant: Variant, settings: LighthouseSettings) -> str:
    """The words by which a run has it: where its layers select for it, not those of `--attention`."""
    selected_for = variant is settings.base is not settings.attention
    return f"{flag('around')} {variant.around}" if selected_for else f"--attention {variant.name}"


def of_base(problems: Iterator[str], settings: LighthouseSettings) -> Iterator[str]:
    """What the attention that layers select for refuses, in the words by which the run has it."""
    name = f"--attention {settings.base.name}"
    yield from (problem.replace(name, asked_by(settings.base, settings)) for problem in problems)


def option_problems(args: Namespace, *had: Variant) -> Iterator[str]:
    """Options of attentions that the run has not. Those of one that `switches` are handed on to what its layers become."""
    for variant in VARIANTS.values():
        if variant.config is None or variant.switches or variant in had:
            continue
        for option in set_options(args, variant.name, variant.config):
            around = f" or {flag('around')} {variant.around}" if variant.around is not None else ""
            yield f"{option} is read with --attention {variant.name}{around} alone: leave it out, or use that."
