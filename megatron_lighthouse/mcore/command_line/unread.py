"""Options of Megatron's parser that nothing reads: not Megatron-core 0.19.2, not upstream's pretrain_gpt.py, not we.

A test holds the lists to what is installed. Imports no Megatron.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

from megatron_lighthouse.mcore.command_line.flags import parser

INSTEAD = {
    "rampup_batch_size": "use --step-batch-size-schedule in place of --global-batch-size",
    "use_flash_attn": "use --attention-backend flash",
    "openai_gelu": "leave it out",
    "apply_residual_connection_post_layernorm": "leave it out",
    "exit_signal_handler_for_dataloader": "use --exit-signal-handler",
    "vocab_extra_ids": "count them in --vocab-size",
    "enable_full_sharding_in_hsdp": "use --data-parallel-sharding-strategy and --outer-dp-sharding-strategy",
    "dist_ckpt_save_pre_mcore_014": "leave it out",
    "onnx_safe": "leave it out",
    "deprecated_use_mcore_models": "",  # there are no others
}
"""Of training: what does the same, if anything does. Without advice, the option asks for what is always so."""

OF_OTHER_PROGRAMS = """
    bert_binary_head bert_embedder_type bert_load output_bert_embeddings mask_prob short_seq_prob sample_rate
    relative_attention_max_distance relative_attention_num_buckets
    biencoder_projection_dim biencoder_shared_query_context_model block_data_path embedding_path evidence_data_path
    ict_head_size ict_load indexer_batch_size indexer_log_interval query_in_block_prob retriever_report_topk_accuracies
    retriever_score_scaling titles_data_path use_one_sent_docs
    classes_fraction data_per_class_fraction dino_bottleneck_size dino_freeze_last_layer dino_head_hidden_size
    dino_local_crops_number dino_local_img_size dino_norm_last_layer dino_teacher_temp dino_warmup_teacher_temp
    dino_warmup_teacher_temp_epochs head_lr_mult img_h img_w iter_per_epoch mask_factor mask_type num_channels num_classes
    patch_dim swin_backbone_type vision_backbone_type
    grpo_clamp_eps_lower grpo_clamp_eps_upper grpo_entropy_term_weight grpo_filter_groups_with_same_reward grpo_kl_beta
    langrl_env_config rl_default_temperature rl_default_top_k rl_default_top_p rl_importance_sampling_truncation_coef
    rl_inference_parsers rl_prompts_per_eval rl_sequence_packing_algo rl_sequence_packing_max_sequences_per_bin
    rl_skip_bos_token rl_verify_model_weights_swap
    inference_dynamic_batching inference_max_requests inference_shards inference_text_gen_server_logging
    inference_wandb_logging max_tokens_to_oom use_legacy_static_engine
""".split()
"""Of BERT, retrieval, vision, reinforcement learning and inference."""

OF_REFUSED = {"fim_data": "fim_", "logits_load_dir": "logits_load_", "inprocess_restart": "inprocess_"}
"""Options that this entry point refuses, and how those begin that mean nothing without them."""


def unread_problems(args: Namespace) -> Iterator[str]:
    """Options that were given another value than their default, and that nothing reads."""
    for action in parser(lambda made: made)._actions:
        name = action.dest
        if getattr(args, name, action.default) == action.default:
            continue
        if advice := INSTEAD.get(name):
            yield f"{action.option_strings[0]} is read by nothing in this Megatron: {advice}."
        elif name in OF_OTHER_PROGRAMS:
            yield f"{action.option_strings[0]} is read by nothing that trains GPT: leave it out."
        elif whole := [option for option, prefix in OF_REFUSED.items() if name.startswith(prefix) and name != option]:
            flag = "--" + whole[0].replace("_", "-")
            yield f"{action.option_strings[0]} means nothing without {flag}, which this entry point refuses: leave it out."
