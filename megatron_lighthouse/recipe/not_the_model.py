"""Fields of Megatron's model configurations, and arguments these are made from, that do not change what weights compute.

An evaluation compares all others with its checkpoint. A test holds both to the installed Megatron.
"""

LAYOUT = """
    account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split batch_p2p_comm batch_p2p_sync
    context_parallel_size cp_comm_type deallocate_pipeline_outputs decoder_first_pipeline_num_layers
    decoder_last_pipeline_num_layers expert_gtp_weight_remat_size expert_model_parallel_size
    expert_tensor_parallel_num_weight_shards expert_tensor_parallel_size gtp_weight_remat_size hetereogenous_dist_checkpoint
    hierarchical_context_parallel_sizes high_priority_a2a_comm_stream hybrid_context_parallel max_seqlen_per_dp_cp_rank
    microbatch_group_size_per_vp_stage moe_deepep_num_sms moe_enable_deepep moe_flex_dispatcher_backend
    moe_flex_dispatcher_num_sms moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute moe_hybridep_num_sms
    moe_hybridep_num_sms_preprocessing moe_hybridep_pad_uneven_dispatch_inputs moe_ncclep_static_shape moe_ncclep_zero_copy
    moe_shared_expert_overlap moe_token_dispatcher_type mtp_standalone num_layers_in_first_pipeline_stage
    num_layers_in_last_pipeline_stage overlap_dispatch_backward_with_experts_wgrad overlap_moe_expert_parallel_comm
    overlap_p2p_comm overlap_p2p_comm_warmup_flush parallel_output pipeline_model_parallel_comm_backend
    pipeline_model_parallel_layout pipeline_model_parallel_size scatter_embedding_sequence_parallel sequence_parallel
    symmetric_ar_type tensor_model_parallel_size tensor_parallel_num_weight_shards tp_comm_atomic_ag tp_comm_atomic_rs
    tp_comm_bootstrap_backend tp_comm_bulk_dgrad tp_comm_bulk_wgrad tp_comm_overlap tp_comm_overlap_ag tp_comm_overlap_cfg
    tp_comm_overlap_disable_fc1 tp_comm_overlap_disable_qkv tp_comm_overlap_rs tp_comm_overlap_rs_dgrad tp_comm_split_ag
    tp_comm_split_rs use_ring_exchange_p2p variable_seq_lengths virtual_pipeline_model_parallel_size
"""
"""Over which ranks it is, and how they communicate."""

NUMBERS = """
    activation_func_fp8_input_store apply_query_key_layer_scaling attention_softmax_in_fp32 autocast_dtype
    batch_invariant_mode bf16 deterministic_mode disable_bf16_reduced_precision_matmul dsa_indexer_k_norm_fp32 enable_autocast
    first_last_layers_bf16 fp16 fp16_lm_cross_entropy fp32_residual_connection fp4 fp4_param fp4_param_gather
    fp4_quantizer_factory fp4_recipe fp8 fp8_amax_compute_algo fp8_amax_history_len fp8_dot_product_attention fp8_interval
    fp8_margin fp8_multi_head_attention fp8_output_proj fp8_param fp8_param_gather fp8_quantizer_factory fp8_recipe fp8_wgrad
    kitchen_config_file kitchen_recipe_number mamba_training_ssm_states_dtype moe_router_dtype moe_router_padding_for_fp8
    moe_router_padding_for_quantization num_layers_at_end_in_bf16 num_layers_at_start_in_bf16 params_dtype pipeline_dtype
    quant_recipe te_precision_config_file tp_only_amax_red use_kitchen
"""
"""The type and rounding of its numbers."""

KERNELS = """
    apply_rope_fusion attention_backend bias_activation_fusion bias_dropout_fusion bias_gelu_fusion bias_swiglu_fusion
    cross_entropy_fusion_impl cross_entropy_loss_fusion cuda_graph_impl cuda_graph_modules cuda_graph_retain_backward_graph
    cuda_graph_scope cuda_graph_use_single_mempool cuda_graph_warmup_steps dsa_kernel_backend enable_cuda_graph
    external_cuda_graph flash_attention_version fused_residual_rmsnorm fused_single_qkv_rope kitchen_attention_backend
    masked_softmax_fusion memory_efficient_layer_norm mla_down_proj_fusion moe_grouped_gemm moe_permute_fusion
    moe_permute_fusion_into_hybridep moe_router_fusion moe_single_grouped_bias moe_single_grouped_weight no_persist_layer_norm
    persist_layer_norm spec transformer_impl transformer_layer_spec use_arbitrary_attention_mask
    use_fused_weighted_squared_relu use_grouped_gemm_for_dense_mlp use_grouped_gemm_for_shared_expert use_kitchen_attention
    use_mamba_mem_eff_path use_te_activation_func use_transformer_engine_op_fuser
"""
"""What computes it, and which layers use Lighthouse."""

TRAINING = """
    _cpu_offloading_context activation_offload_fraction attention_dropout calculate_per_token_loss
    clone_scatter_output_in_embedding cpu_offloading cpu_offloading_activations cpu_offloading_double_buffering
    cpu_offloading_num_layers cpu_offloading_retain_pinned_cpu_buffers cpu_offloading_weights defer_embedding_wgrad_compute
    delay_offload_until_cuda_graph delay_wgrad_compute delta_offload_bytes_across_pp_ranks disable_parameter_transpose_cache
    distribute_saved_activations dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss embedding_init_method
    embedding_init_method_std ep_overlap_early_attn_memory_release experimental_attention_variant_loss_scale_func
    finalize_model_grads_func fine_grained_activation_offloading fine_grained_offloading_max_inflight_offloads grad_scale_func
    grad_sync_func gradient_accumulation_fusion hidden_dropout init_method init_method_std init_method_xavier_uniform
    init_model_with_meta_device log_max_attention_logit min_offloaded_tensor_size moe_aux_loss_coeff moe_enable_routing_replay
    moe_grad_scale_func moe_layer_recompute moe_paged_stash moe_paged_stash_buffer_size_factor_cpu
    moe_paged_stash_buffer_size_factor_cuda moe_paged_stash_page_size moe_per_layer_logging moe_router_bias_update_rate
    moe_router_quantile_balancing_ema moe_z_loss_coeff mtp_detach_heads mtp_grad_scale_func mtp_hybrid_override_pattern
    mtp_loss_scaling_factor mtp_num_layers mtp_use_repeated_layer no_sync_func
    num_microbatches_with_partial_activation_checkpoints offload_modules output_layer_init_method param_sync_func
    perform_initialization qk_clip qk_clip_alpha qk_clip_threshold recompute_granularity recompute_method recompute_modules
    recompute_num_layers seed use_cpu_initialization use_te_rng_tracker wgrad_deferral_limit
"""
"""How its weights came to be. Layers that predict further tokens (MTP) stand beside those that predict the next."""

SERVING = """
    cache_mla_latents flash_decode inference_cuda_graph_scope inference_disable_triton_nvls_kernels
    inference_fuse_tp_communication inference_grouped_gemm_backend inference_moe_disable_fused_quant_kernels
    inference_moe_token_dispatcher_type inference_rng_tracker inference_sampling_seed mlp_chunks_for_prefill
    mlp_chunks_for_training moe_pad_experts_for_cuda_graph_inference nccl_all_reduce_for_prefill
    use_inference_optimized_layers
"""

TOLD_OTHERWISE = """
    activation_func beta_fast beta_slow gated_linear_unit group_query_attention heterogeneous_block_specs
    heterogeneous_layers_config_path make_vocab_size_divisible_by max_position_embeddings moe_router_topk_limited_devices
    moe_token_dropping num_moe_experts original_max_position_embeddings per_block_parameters rope_scaling
    seq_len_interpolation_factor seq_length share_embeddings_and_output_weights should_pad_vocab softmax_scale transformer
    vocab_size yaml_cfg
"""
"""Made from arguments that are compared, or no argument at all; and lengths, which are compared where positions are learnt."""

NOTHING = """
    apply_residual_connection_post_layernorm barrier_with_L1_time config_logger_dir extra_checkpoint_metadata post_wrap_hooks
    pre_wrap_hooks restore_modelopt_state test_mode timers
"""

NOT_THE_MODEL = {*LAYOUT.split(), *NUMBERS.split(), *KERNELS.split(), *TRAINING.split(), *SERVING.split()}
NOT_THE_MODEL |= {*TOLD_OTHERWISE.split(), *NOTHING.split()}
