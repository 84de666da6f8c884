"""Whether arguments describe the model that a checkpoint holds: most of what shapes a model is not in its weights."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from megatron_lighthouse.recipe.not_the_model import NOT_THE_MODEL
from megatron_lighthouse.usage import as_flag

FROM_ARGUMENTS = """
    hybrid_layer_pattern num_experts padded_vocab_size quick_geglu rotary_seq_len_interpolation_factor squared_relu swiglu
    untie_embeddings_and_output_weights use_rope_scaling
    yarn_beta_fast yarn_beta_slow yarn_correction_range_round_to_int yarn_original_max_position_embeddings
""".split()
"""Megatron's arguments that change what a model computes, and that no field of its configurations is named after."""

OFF = {
    "add_bias_linear": "--disable-bias-linear",
    "dsa_indexer_rotate_activation": "--no-dsa-indexer-rotate-activation",
    "dsa_indexer_scoring_relu": "--no-dsa-indexer-scoring-relu",
}
"""By their flags, which set them to False."""
FLAGS = {"layernorm_epsilon": "--norm-epsilon", "layernorm_zero_centered_gamma": "--apply-layernorm-1p", **OFF}
"""Where a flag has another name."""


def shape() -> list[str]:
    """Arguments that change what a model computes: each field of Megatron's configurations not known to leave that alone.

    Not the layout over ranks, the numbers' type or what computes it, nor the length of a sequence and which layers use
    Lighthouse, which an evaluation may choose.
    """
    from megatron.core.transformer import MLATransformerConfig
    from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig
    from megatron.training.models import GPTModelConfig

    kinds = (MLATransformerConfig, HeterogeneousTransformerConfig, GPTModelConfig)
    names = [field.name for kind in kinds for field in fields(kind) if field.name not in NOT_THE_MODEL]
    return [*dict.fromkeys([*names, *FROM_ARGUMENTS])]


def check_same_model(args: argparse.Namespace, stored: argparse.Namespace | None) -> None:
    """Refuse arguments of another model than that of the checkpoint.

    Args:
        args: Megatron's, after it has filled in and checked them.
        stored: the same of the run that made the checkpoint. What it does not say is not compared.

    Raises:
        ValueError: every argument that differs, a line each, with both values.
    """
    given, there = _values(args), _values(stored) if stored else {}
    names = [*shape(), *(["max_position_embeddings"] if args.position_embedding_type == "learned_absolute" else [])]
    different = [name for name in names if name in given and name in there and given[name] != there[name]]
    if different:
        lines = [f"{_flag(name)} {_shown(name, given[name])}, there {_shown(name, there[name])}" for name in different]
        raise ValueError(
            f"--load {args.load} holds another model than the arguments describe: give those of its run.\n  - "
            + "\n  - ".join(lines)
        )


def _values(args: argparse.Namespace) -> dict[str, Any]:
    values = dict(vars(args))
    if values.get("group_query_attention") is False:
        values["num_query_groups"] = args.num_attention_heads  # as Megatron itself says once it trains, and not before
    return values


def _flag(name: str) -> str:
    return FLAGS.get(name, as_flag(name))


def _shown(name: str, value: Any) -> str:
    return ("given" if value != (name in OFF) else "not given") if isinstance(value, bool) else str(value)
