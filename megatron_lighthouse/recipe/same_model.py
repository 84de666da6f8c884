"""Whether arguments describe the model that a checkpoint holds: most of what shapes a model is not in its weights. Imports no
Megatron.
"""

from __future__ import annotations

import argparse
from typing import Any

SHAPE = """
    num_layers hidden_size ffn_hidden_size num_attention_heads kv_channels num_query_groups
    padded_vocab_size untie_embeddings_and_output_weights
    position_embedding_type add_position_embedding rotary_base rotary_percent rotary_interleaved
    rotary_seq_len_interpolation_factor use_rope_scaling rope_scaling_factor no_rope_freq
    normalization layernorm_epsilon layernorm_zero_centered_gamma apply_residual_connection_post_layernorm
    qk_layernorm qk_l2_norm softmax_type window_size window_attn_skip_freq attention_output_gate
    swiglu squared_relu openai_gelu quick_geglu glu_linear_offset activation_func_clamp_value add_bias_linear add_qkv_bias
    multi_latent_attention q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim
    rotary_scaling_factor mscale mscale_all_dim
    num_experts moe_layer_freq moe_ffn_hidden_size moe_latent_size moe_shared_expert_intermediate_size moe_shared_expert_gate
    moe_router_topk moe_router_pre_softmax moe_router_score_function moe_router_topk_scaling_factor moe_router_num_groups
    moe_router_group_topk moe_router_enable_expert_bias
    use_mup mup_width_mult mup_base_hidden_size mup_embedding_mult mup_output_mult mup_base_head_dim mup_attn_scale_power
""".split()
"""Megatron's arguments that change what a model computes. Not the layout over ranks, the numbers' type or what computes it, nor
the length of a sequence and which layers use Lighthouse, which an evaluation may choose."""

OFF = {"add_bias_linear": "--disable-bias-linear", "add_position_embedding": "--no-position-embedding"}
"""By their flags, which set them to False."""
FLAGS = {"layernorm_epsilon": "--norm-epsilon", "layernorm_zero_centered_gamma": "--apply-layernorm-1p", **OFF}
"""Where a flag has another name."""


def check_same_model(args: argparse.Namespace, stored: argparse.Namespace | None) -> None:
    """Refuse arguments of another model than that of the checkpoint.

    Args:
        args: Megatron's, after it has filled in and checked them.
        stored: the same of the run that made the checkpoint. What it does not say is not compared.

    Raises:
        ValueError: every argument that differs, a line each, with both values.
    """
    given, there = _values(args), _values(stored) if stored else {}
    names = [*SHAPE, *(["max_position_embeddings"] if args.position_embedding_type == "learned_absolute" else [])]
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
    return FLAGS.get(name, "--" + name.replace("_", "-"))


def _shown(name: str, value: Any) -> str:
    return ("given" if value != (name in OFF) else "not given") if isinstance(value, bool) else str(value)
