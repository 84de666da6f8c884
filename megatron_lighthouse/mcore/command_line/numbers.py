"""Numbers that no run can mean, of those of Megatron's flags that training reads. Imports no Megatron.

Megatron-core 0.19 takes most of them, and fails late, divides by them, or trains on without a word. A test holds the groups to
the list of its flags.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from functools import cache

from megatron_lighthouse.mcore.command_line.flags import listed

ONE = """
    tensor_model_parallel_size tensor_parallel_num_weight_shards pipeline_model_parallel_size context_parallel_size
    hierarchical_context_parallel_sizes max_seqlen_per_dp_cp_rank expert_model_parallel_size expert_tensor_parallel_size
    expert_tensor_parallel_num_weight_shards microbatch_group_size_per_vp_stage num_layers_per_virtual_pipeline_stage
    num_virtual_stages_per_pipeline_rank decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers
    num_distributed_optimizer_instances
    num_layers encoder_num_layers decoder_num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups
    kv_channels max_position_embeddings seq_length encoder_seq_length decoder_seq_length vocab_size padded_vocab_size
    make_vocab_size_divisible_by
    q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim
    moe_shared_expert_intermediate_size moe_shared_expert_glu_interleave_size moe_ffn_hidden_size moe_router_topk
    moe_router_num_groups moe_router_group_topk moe_latent_size moe_mlp_glu_interleave_size moe_upcycling_granularity
    moe_layer_freq linear_attention_freq no_rope_freq window_attn_skip_freq
    linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim linear_num_key_heads linear_num_value_heads
    mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads mlp_chunks_for_training mup_base_hidden_size
    rotary_base rotary_seq_len_interpolation_factor yarn_original_max_position_embeddings
    micro_batch_size global_batch_size eval_micro_batch_size eval_global_batch_size
    log_interval tensorboard_log_interval eval_interval log_memory_interval check_weight_hash_across_dp_replicas_interval
    save_params_interval save_activations_interval save_tokens_per_expert_interval save_wgrads_interval save_dgrads_interval
    adlr_autoresume_interval tensorboard_queue_size
    lr_decay_iters lr_decay_samples gpu_sniff_test_interval
    recompute_num_layers fp8_interval fp8_amax_history_len loss_scale_window hysteresis muon_num_ns_steps
    ddp_num_buckets ddp_bucket_size distributed_timeout_minutes distributed_timeout_seconds_after_init
    num_dataset_builder_threads dist_ckpt_workers seed
""".split()
"""At least 1."""
NONE = """
    wgrad_deferral_limit cpu_offloading_num_layers num_experts mtp_num_layers num_layers_at_start_in_bf16
    num_layers_at_end_in_bf16 cuda_graph_warmup_steps min_offloaded_tensor_size
    layernorm_epsilon init_method_std embedding_init_method_std mtp_loss_scaling_factor moe_aux_loss_coeff moe_z_loss_coeff
    moe_input_jitter_eps moe_router_bias_update_rate mscale mscale_all_dim
    weight_decay start_weight_decay end_weight_decay clip_grad adam_eps
    train_iters train_samples exit_interval exit_duration_in_mins train_sync_interval manual_gc_interval
    iterations_to_skip eval_iters start_eval_at_iter num_workers mid_level_dataset_surplus
    lr_warmup_iters lr_warmup_samples lr_wsd_decay_iters lr_wsd_decay_samples decoupled_lr decoupled_min_lr
    profile_step_start profile_step_end profile_ranks non_persistent_save_interval ckpt_step flight_recorder_trace_buffer_size
    moe_routing_trace_max_training_iters tiktoken_num_special_tokens loss_scale
""".split()
"""At least 0, which often is none."""
ABOVE = """
    rope_scaling_factor rotary_scaling_factor yarn_beta_fast yarn_beta_slow qk_clip_threshold mup_width_mult mup_base_head_dim
    moe_router_topk_scaling_factor initial_loss_scale min_loss_scale
""".split()
"""Above 0."""
SHARE = """
    hidden_dropout attention_dropout qk_clip_alpha optimizer_offload_fraction activation_offload_fraction
    moe_router_quantile_balancing_ema
""".split()
"""From 0 to 1."""
DECAY = "adam_beta1 adam_beta2 sgd_momentum muon_momentum lion_beta1 lion_beta2".split()
"""From 0 up to, not including, 1."""
PART = ["rotary_percent"]
"""Above 0, up to 1."""
ADVICE = {
    "eval_interval": "To evaluate never, use --eval-iters 0.",
    "recompute_num_layers": "To recompute nothing, leave --recompute-granularity out.",
    "vocab_size": "Give the number of different tokens in the data.",
    "num_query_groups": "Without --group-query-attention each head has keys of its own.",
}
"""What else would work."""
type Keeps = Callable[[float], bool]
RULES: dict[str, tuple[str, Keeps]] = {
    **dict.fromkeys(ONE, ("at least 1", lambda x: x >= 1)),
    **dict.fromkeys(NONE, ("at least 0", lambda x: x >= 0)),
    **dict.fromkeys(ABOVE, ("above 0", lambda x: x > 0)),
    **dict.fromkeys(SHARE, ("from 0 to 1", lambda x: 0 <= x <= 1)),
    **dict.fromkeys(DECAY, ("from 0 up to, not including, 1", lambda x: 0 <= x < 1)),
    **dict.fromkeys(PART, ("above 0, and at most 1", lambda x: 0 < x <= 1)),
}
"""By argument: the rule in words, and whether a number keeps it."""
ANY: tuple[str, Keeps] = ("finite", lambda x: True)
LEAST = {"at least 1": 1, "at least 0": 0, "above 0": 1}
"""What is offered where Megatron has no default."""


@cache
def _flags() -> dict[str, tuple[str, object]]:
    """By argument, its flag and its default."""
    return {flag["dest"]: (flag["flags"][0], flag.get("default")) for flag in listed()}


def problems(args: argparse.Namespace) -> Iterator[str]:
    """Numbers that break their rule, or are none, each with what works.

    Args:
        args: as the words say, not validated.
    """
    yield from (problem for _, problem in _broken(args))


def settle(args: argparse.Namespace) -> list[str]:
    """`problems`, after which other rules can reckon: `args` have Megatron's defaults there, and the flags as `malformed`."""
    found, known = [*_broken(args)], _flags()
    for name, _ in found:
        setattr(args, name, known[name][1])
    args.malformed = frozenset({*getattr(args, "malformed", ()), *(known[name][0] for name, _ in found)})
    return [problem for _, problem in found]


def _broken(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Each number that breaks its rule: the argument, and the problem."""
    for name, (flag, default) in _flags().items():
        given = getattr(args, name, default)
        if given == default:
            continue
        rule, keeps = RULES.get(name, ANY)
        for value in given if isinstance(given, (list, tuple)) and not name.endswith("_freq") else [given]:
            if isinstance(value, float) and not math.isfinite(value):
                yield name, f"{flag} {value} must be finite: {_use(name, default, rule)}"
            elif isinstance(value, (int, float)) and not keeps(value):
                yield name, f"{flag} {value} must be {rule}: {_use(name, default, rule)}"
    if (window := getattr(args, "window_size", None)) is not None and len(window) != 2:
        given = ",".join(map(str, window))
        yield "window_size", f"--window-size {given} must be two numbers, of tokens before and after: use {window[0]},0."


def _use(name: str, default: object, rule: str) -> str:
    if isinstance(default, (int, float)) and RULES.get(name, ANY)[1](default):
        use = f"use {default}, Megatron's default, or another."
    else:
        use = f"use {LEAST[rule]} or more." if rule in LEAST else "use another, or leave it out."
    return " ".join(filter(None, (use, ADVICE.get(name))))
