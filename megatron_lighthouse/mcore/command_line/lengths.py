"""Whether a length and budgets go together, over all layers; and what else a run's sizes must keep to. Imports no Megatron."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from megatron_lighthouse.lighthouse.by_length import NAMES, by_length
from megatron_lighthouse.lighthouse.config import LighthouseConfig
from megatron_lighthouse.lighthouse.remedies import Allowed, Sizes, anything
from megatron_lighthouse.mcore.command_line import evenly
from megatron_lighthouse.mcore.command_line.settings import LighthouseSettings, comm_types_of, heads_of_rank, of_edge


def settings_problems(settings: LighthouseSettings, seq_length: int, ranks: int, allowed: Allowed = anything) -> Iterator[str]:
    """Why so many tokens on so many context-parallel ranks do not fit the layers, edge layers among them.

    Args:
        allowed: sizes that nothing else refuses: no others are offered.
    """
    own, edge, attention = settings.config, settings.edge, settings.attention
    if attention.selects:
        allowed = _followed(own, edge, seq_length, allowed)
    if edge is None:
        yield from attention.length_problems(own, seq_length, ranks, allowed)
        return

    def beside(budget: int) -> Allowed:  # which has the same tiles
        return lambda tried: tried._replace(budget=budget).fit and allowed(tried)

    yield from attention.length_problems(own, seq_length, ranks, beside(edge.budget))
    yield from map(of_edge, attention.length_problems(edge, seq_length, ranks, beside(own.budget)))


def _followed(own: LighthouseConfig, edge: LighthouseConfig | None, seq_length: int, allowed: Allowed) -> Allowed:
    """What is allowed of other lengths where the config may follow the length: with what it would be there, too."""
    levels, tiles = {"levels": own.levels}, {"tile_budget": own.tile_budget}
    as_given: tuple[dict[str, int], ...] = ({}, levels, tiles, levels | tiles)
    mine = {name: getattr(own, name) for name in NAMES}
    follows = [given for given in as_given if by_length(max(1, seq_length), own.pooling, **given) == mine]

    def still(tried: Sizes) -> bool:
        if tried.seq_length == seq_length or not allowed(tried):
            return allowed(tried)
        there = [tried._replace(**by_length(tried.seq_length, own.pooling, **given)) for given in follows]
        there += [sizes._replace(budget=edge.budget) for sizes in there] if edge else []
        return all(sizes.fit for sizes in there)

    return still


def limits_of(args: Namespace, config: Any) -> Allowed:
    """What a run keeps to besides: positions, GPUs, its batch, and heads that context-parallel ranks share out.

    Args:
        args: Megatron's; GPUs are looked at where they have a world_size.
        config: a TransformerConfig, or what `config_of` makes of the arguments.
    """
    world, ranks = getattr(args, "world_size", None), config.context_parallel_size
    alone = config.tensor_model_parallel_size * getattr(args, "pipeline_model_parallel_size", 1)
    batch, micro = getattr(args, "global_batch_size", None), getattr(args, "micro_batch_size", None) or 1
    heads, groups = heads_of_rank(config)

    def allowed(tried: Sizes) -> bool:
        if tried.seq_length > (getattr(args, "max_position_embeddings", None) or tried.seq_length):
            return False
        if tried.seq_length % evenly.tokens(args, tried.ranks):
            return False
        if tried.ranks == ranks:
            return True
        one = alone * tried.ranks
        if world and (world % one or (batch and batch % (micro * (world // one)))):
            return False
        return "a2a" not in comm_types_of(config) or not (heads % tried.ranks or groups % tried.ranks)

    return allowed
