"""Whether an evaluation compares all that shapes a model, in the Megatron that is installed."""

from __future__ import annotations

import argparse
import inspect
from argparse import Namespace
from dataclasses import fields
from typing import Any

import pytest

from megatron_lighthouse.recipe.not_the_model import NOT_THE_MODEL
from megatron_lighthouse.recipe.same_model import FROM_ARGUMENTS, _flag, check_same_model, shape
from tests.mcore.upstream_reads import reads

pytestmark = pytest.mark.usefixtures("megatron")

SHAPES = """
    num_layers hidden_size num_attention_heads softmax_type num_query_groups ffn_hidden_size kv_channels layernorm_epsilon
    layernorm_zero_centered_gamma add_bias_linear add_qkv_bias glu_linear_offset activation_func_clamp_value
    rotary_interleaved window_size window_attn_skip_freq normalization qk_layernorm qk_l2_norm attention_output_gate
    multi_latent_attention no_rope_freq experimental_attention_variant dsa_indexer_n_heads dsa_indexer_head_dim
    dsa_indexer_topk dsa_indexer_topk_freq dsa_indexer_skip_topk_offset dsa_indexer_rope_interleaved
    dsa_indexer_rotate_activation dsa_indexer_scoring_relu dsa_indexer_k_norm_epsilon linear_attention_freq
    linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim linear_num_key_heads linear_num_value_heads use_mup
    mup_width_mult mup_base_hidden_size mup_embedding_mult mup_output_mult mup_base_head_dim mup_attn_scale_power
    moe_shared_expert_intermediate_size moe_shared_expert_gate moe_shared_expert_glu_interleave_size moe_layer_freq
    moe_ffn_hidden_size moe_router_load_balancing_type moe_router_topk moe_router_num_groups moe_router_group_topk
    moe_router_pre_softmax moe_router_topk_scaling_factor moe_router_score_function moe_router_enable_expert_bias
    moe_router_force_load_balancing moe_router_force_biased moe_input_jitter_eps moe_expert_capacity_factor
    moe_pad_expert_input_to_capacity moe_token_drop_policy moe_apply_probs_on_input moe_latent_size
    moe_mlp_glu_interleave_size moe_expert_rank_capacity_factor mrope_section is_hybrid_model mamba_state_dim mamba_head_dim
    mamba_num_groups mamba_num_heads q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim rope_type
    rotary_base rotary_percent rotary_scaling_factor mscale mscale_all_dim heterogeneous_layers_config_encoded_json
    position_embedding_type rope_scaling_factor hybrid_layer_pattern num_experts padded_vocab_size quick_geglu
    rotary_seq_len_interpolation_factor squared_relu swiglu untie_embeddings_and_output_weights use_rope_scaling
    yarn_beta_fast yarn_beta_slow yarn_correction_range_round_to_int yarn_original_max_position_embeddings
""".split()
"""Fields and arguments somebody has looked at, and found that they change what a model computes."""


def made_from() -> set[str]:
    """Arguments that Megatron makes a model's configuration from."""
    from megatron.training import argument_utils as made

    makers = (made.core_transformer_config_from_args, made._apply_yarn_config_from_args, made.gpt_config_from_args)
    return set().union(*(reads(inspect.getsource(maker)) for maker in makers))


def model_fields() -> set[str]:
    from megatron.core.transformer import MLATransformerConfig
    from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig
    from megatron.training.models import GPTModelConfig

    kinds = (MLATransformerConfig, HeterogeneousTransformerConfig, GPTModelConfig)
    return {field.name for kind in kinds for field in fields(kind)}


def test_somebody_has_classified_every_field() -> None:
    """Of a new release: does it change what the weights compute? Then into SHAPES, else into recipe/not_the_model.py."""
    assert {*shape()} == {*SHAPES}
    assert made_from() <= {*SHAPES} | NOT_THE_MODEL
    assert not NOT_THE_MODEL - model_fields() - made_from()
    assert not {*FROM_ARGUMENTS} - made_from() | {*FROM_ARGUMENTS} & model_fields()


def test_every_compared_argument_is_megatrons() -> None:
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    flags = {flag: action.dest for action in parser._actions for flag in action.option_strings}
    assert {name: flags.get(_flag(name)) for name in shape()} == {name: name for name in shape()}


@pytest.mark.parametrize(
    ("name", "given", "there", "message"),
    [
        ("yarn_original_max_position_embeddings", 4096, 256, "--yarn-original-max-position-embeddings 4096, there 256"),
        ("yarn_beta_fast", 32.0, 16.0, "--yarn-beta-fast 32.0, there 16.0"),
        ("moe_expert_capacity_factor", None, 1.0, "--moe-expert-capacity-factor None, there 1.0"),
        ("moe_token_drop_policy", "probs", "position", "--moe-token-drop-policy probs, there position"),
        ("mrope_section", [1, 2], [2, 1], "--mrope-section"),
        ("dsa_indexer_scoring_relu", True, False, "--no-dsa-indexer-scoring-relu not given, there given"),
    ],
)
def test_another_model_is_refused(name: str, given: Any, there: Any, message: str) -> None:
    both = {"load": "ckpt", "position_embedding_type": "rope"}
    check_same_model(Namespace(**both, **{name: given}), Namespace(**both, **{name: given}))
    with pytest.raises(ValueError, match=message):
        check_same_model(Namespace(**both, **{name: given}), Namespace(**both, **{name: there}))
