"""What is refused by the parts that stand in for Megatron's local ones: dense attention over shards, and torch's norm.

Asked when these are built, and before. Imports no Megatron.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_lighthouse.context_parallel.schemes import comm_type_problem
from megatron_lighthouse.mcore.command_line.settings import comm_types_of, heads_of_rank
from megatron_lighthouse.options import in_flags

NORMS = ("LayerNorm", "RMSNorm")


def has_own_attention(config: Any) -> bool:
    """Whether dense layers take this project's attention over shards in place of Megatron's local one."""
    return bool(config.context_parallel_size > 1 and config.transformer_impl == "local")


def over_shards_problems(config: Any, dropout: float | None = None) -> Iterator[str]:
    """Why dense attention over shards cannot be in a model, whatever the scheme.

    Args:
        config: a TransformerConfig, or what `config_of` makes of arguments.
        dropout: of this layer; None: the model's.
    """
    dropout = config.attention_dropout if dropout is None else dropout
    if dropout:
        yield (
            f"--attention-dropout {dropout} does not go with --context-parallel-size {config.context_parallel_size} without "
            "Transformer Engine: use --attention-dropout 0."
        )
    if config.window_size is not None or config.softmax_type != "vanilla":
        yield (
            f"--window-size {config.window_size} and --softmax-type {config.softmax_type} do not go with "
            f"--context-parallel-size {config.context_parallel_size} without Transformer Engine: leave them out."
        )


def scheme_problems(config: Any) -> Iterator[str]:
    """Why its ranks cannot be crossed as --cp-comm-type says."""
    heads, groups = (max(1, n) for n in heads_of_rank(config))
    for kind in comm_types_of(config):
        if problem := comm_type_problem(kind, heads, groups, config.context_parallel_size):
            yield in_flags(problem)


def norm_problem(config: Any) -> str | None:
    """Why torch has no such norm."""
    if config.normalization in NORMS and not config.layernorm_zero_centered_gamma:
        return None
    return (
        f"--normalization {config.normalization} (zero-centred: {config.layernorm_zero_centered_gamma}) with "
        "--sequence-parallel needs Apex or --transformer-impl transformer_engine: use LayerNorm or RMSNorm without "
        "--apply-layernorm-1p here."
    )
