"""What our stand-ins for Megatron's local parts refuse, and what Transformer Engine's attention lacks over ranks.

The stand-ins are dense attention over shards, and torch's norm. Asked when these are built, and before. Imports no Megatron.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_lighthouse.context_parallel.schemes import comm_type_problem
from megatron_lighthouse.mcore.command_line.layers import is_windowed, local_window_problem
from megatron_lighthouse.mcore.command_line.settings import comm_types_of, heads_of_rank
from megatron_lighthouse.options import as_words, in_flags

NORMS = ("LayerNorm", "RMSNorm")


def has_own_attention(config: Any) -> bool:
    """Whether dense layers take this project's attention over shards in place of Megatron's local one."""
    return bool(config.context_parallel_size > 1 and config.transformer_impl == "local")


def learns_shared_sinks(config: Any) -> bool:
    """Whether tensor-parallel ranks learn the sinks of their heads, which Megatron 0.19 does not count as such."""
    return bool(config.softmax_type == "learnable" and config.tensor_model_parallel_size > 1)


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
    if problem := local_window_problem(config.window_size):
        yield problem


def engine_problems(config: Any) -> Iterator[str]:
    """What Transformer Engine's attention lacks over context-parallel ranks, which it says once a layer is called."""
    if config.transformer_impl != "transformer_engine" or config.context_parallel_size == 1:
        return
    window, softmax = getattr(config, "window_size", None), getattr(config, "softmax_type", "vanilla")
    kinds = config.cp_comm_type
    numbers = [n for n in range(1, config.num_layers + 1) if is_windowed(config, n)] if window else []
    of_windows = {kinds[n - 1] for n in numbers if n <= len(kinds)} if isinstance(kinds, list) else {kinds or "p2p"}
    for kind in sorted(of_windows - {"a2a", "all_gather"}) if numbers else ():
        yield (
            f"{as_words('--window-size', window)} with --cp-comm-type {kind}: Transformer Engine's attention has no windows "
            "over ranks by it: use --cp-comm-type a2a or all_gather, or --transformer-impl local."
        )
    for kind in comm_types_of(config) if softmax != "vanilla" else ():
        if kind != "a2a":
            yield (
                f"--softmax-type {softmax} with --cp-comm-type {kind}: Transformer Engine's attention has no sinks over ranks "
                "by it: use --cp-comm-type a2a, or --transformer-impl local."
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
