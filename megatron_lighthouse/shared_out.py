"""Heads that tensor-parallel ranks cannot share out, with the sizes that could. Imports no torch."""

from __future__ import annotations

import math
from typing import Any

from megatron_lighthouse.nearest import around, either


def shared_out_problem(flag: str, heads: int, ranks: int, common: int) -> str | None:
    """Why so many heads cannot be shared out among tensor-parallel ranks, of which those are offered that divide `common`."""
    if heads % ranks == 0:
        return None
    return (
        f"{flag} {heads} must be a multiple of --tensor-model-parallel-size {ranks}: use --tensor-model-parallel-size "
        f"{either(around(ranks, lambda size: common % size == 0, heads))}."
    )


def groups_problem(model: Any, copied: bool = False) -> str | None:
    """The same of key/value heads, of Megatron's arguments or a TransformerConfig.

    None where the query heads are no multiple of them: that is said, with numbers that the ranks share out.

    Args:
        copied: whether several ranks may have the same head, as Megatron gives them where there are fewer heads than ranks.
    """
    groups, ranks = model.num_query_groups or model.num_attention_heads, model.tensor_model_parallel_size
    if not groups or model.num_attention_heads % groups or (copied and ranks % groups == 0):
        return None
    common = math.gcd(groups, gpus_shared(model))
    return shared_out_problem("--num-query-groups", groups, ranks, common)


def gpus_shared(model: Any) -> int:
    """Those that tensor- and data-parallel ranks share; 0 where it is not known."""
    world = getattr(model, "world_size", None)
    others = model.context_parallel_size * model.pipeline_model_parallel_size if world else 1
    return world // others if world and world % others == 0 else 0
