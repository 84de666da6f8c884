"""What a causal selection does not go with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_lighthouse.lighthouse.scorers import SCORERS

if TYPE_CHECKING:
    from megatron_lighthouse.lighthouse.config import LighthouseConfig

NAME = "config.causal_selection"


def scorers_for(config: LighthouseConfig) -> list[str]:
    """The names of those that go with the selection that a config asks for: a causal one, those that no later token decides."""
    return [name for name, scorer in SCORERS.items() if scorer.causal or not config.causal_selection]


def causal_problem(config: LighthouseConfig) -> str | None:
    """Why the selection that a config asks for cannot be causal; None where it can, or need not be."""
    if not config.causal_selection:
        return None
    if not SCORERS[config.scorer].causal:
        by_length = [name for name in scorers_for(config) if SCORERS[name].by_length]
        others = " or ".join(name for name in scorers_for(config) if name not in by_length)
        return (
            f"{NAME} True is for scores that no later token decides, and those of config.scorer {config.scorer} rest on tokens "
            f"up to the end of the tile: use config.scorer {others}, where queries and keys are not normed also "
            f"{' or '.join(by_length)}, or {NAME} False."
        )
    if not config.pin_first:
        return (
            f"{NAME} True always refines the first window of each tile, so that config.pin_first False means nothing beside "
            f"it: use config.pin_first True, or {NAME} False."
        )
    return None


def causal_documents_problem(config: LighthouseConfig) -> str | None:
    """Why selections in packed documents cannot be causal; None where they need not be."""
    if not config.causal_selection:
        return None
    return f"{NAME} True is not done for packed documents: use {NAME} False."
