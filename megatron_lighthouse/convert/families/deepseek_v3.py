"""DeepSeek-V3: multi-latent attention, first layers dense, a bias of the router in fp32, layers that predict further tokens."""

from __future__ import annotations

from megatron_lighthouse.convert.family import Config, Family, Weight, gated

ATTENTION = [
    Weight("input_layernorm.weight", {"input_layernorm.weight": ("hidden",)}),
    Weight("self_attention.linear_q_down_proj.weight", {"self_attn.q_a_proj.weight": ("q_rank", "hidden")}),
    Weight(
        "self_attention.q_layernorm.weight",
        {"self_attn.q_a_layernorm.weight": ("q_rank",)},
        also=("self_attention.linear_q_up_proj.layer_norm_weight",),
    ),
    Weight("self_attention.linear_q_up_proj.weight", {"self_attn.q_b_proj.weight": ("q", "q_rank")}),
    Weight("self_attention.linear_kv_down_proj.weight", {"self_attn.kv_a_proj_with_mqa.weight": ("kv_rank_rope", "hidden")}),
    Weight(
        "self_attention.kv_layernorm.weight",
        {"self_attn.kv_a_layernorm.weight": ("kv_rank",)},
        also=("self_attention.linear_kv_up_proj.layer_norm_weight",),
    ),
    Weight("self_attention.linear_kv_up_proj.weight", {"self_attn.kv_b_proj.weight": ("kv", "kv_rank")}),
    Weight("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": ("hidden", "v")}),
    Weight(
        "pre_mlp_layernorm.weight",
        {"post_attention_layernorm.weight": ("hidden",)},
        also=("mlp.linear_fc1.layer_norm_weight",),  # where a layer has no experts
    ),
]
ROUTED = [
    Weight("mlp.router.weight", {"mlp.gate.weight": ("experts", "hidden")}),
    Weight("mlp.router.expert_bias", {"mlp.gate.e_score_correction_bias": ("experts",)}),
    *gated("mlp.shared_experts", "mlp.shared_experts", "shared_ffn"),
]
MTP = [
    Weight("enorm.weight", {"enorm.weight": ("hidden",)}),
    Weight("hnorm.weight", {"hnorm.weight": ("hidden",)}),
    Weight("eh_proj.weight", {"eh_proj.weight": ("hidden", "two_hidden")}),
    Weight("final_layernorm.weight", {"shared_head.norm.weight": ("hidden",)}),
]
FIXED = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "norm_topk_prob": (True,),
    "moe_layer_freq": (1,),
    "rope_interleave": (True,),
    "rms_norm_eps": (1e-6,),  # the latents' norms have it whatever config.json says
}


def sizes(config: Config) -> dict[str, int]:
    heads, nope, rope, value = (
        config[name] for name in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    return {
        **{"hidden": config["hidden_size"], "two_hidden": 2 * config["hidden_size"], "vocab": config["vocab_size"]},
        **{"heads": heads, "q": heads * (nope + rope), "kv": heads * (nope + value), "v": heads * value},
        **{"q_rank": config["q_lora_rank"], "kv_rank": config["kv_lora_rank"]},
        **{"kv_rank_rope": config["kv_lora_rank"] + rope, "ffn": config["intermediate_size"]},
        **{"experts": config["n_routed_experts"], "expert_ffn": config["moe_intermediate_size"]},
        "shared_ffn": config["n_shared_experts"] * config["moe_intermediate_size"],
    }


def has_experts(config: Config) -> list[bool]:
    return [n >= config["first_k_dense_replace"] for n in range(config["num_hidden_layers"])]


def arguments(config: Config) -> list[str]:
    limited = config["topk_group"] < config["n_group"]
    if limited and config["num_experts_per_tok"] != 2 * config["topk_group"]:
        raise ValueError(
            f"config.json's num_experts_per_tok {config['num_experts_per_tok']} with topk_group {config['topk_group']} cannot "
            "be carried over: a group counts as much as its best two experts, and in Megatron as its best "
            "num_experts_per_tok / topk_group."
        )
    given = {
        "--q-lora-rank": "q_lora_rank",
        "--kv-lora-rank": "kv_lora_rank",
        "--qk-head-dim": "qk_nope_head_dim",
        "--qk-pos-emb-head-dim": "qk_rope_head_dim",
        "--v-head-dim": "v_head_dim",
        "--num-experts": "n_routed_experts",
        "--moe-ffn-hidden-size": "moe_intermediate_size",
        "--moe-router-topk": "num_experts_per_tok",
        **({"--moe-router-num-groups": "n_group", "--moe-router-group-topk": "topk_group"} if limited else {}),
    }
    return [
        *("--swiglu", "--disable-bias-linear", "--multi-latent-attention", "--qk-layernorm"),
        *(word for flag, name in given.items() for word in (flag, str(config[name]))),
        *("--moe-router-topk-scaling-factor", str(float(config["routed_scaling_factor"]))),
        *("--moe-router-score-function", "sigmoid", "--moe-router-enable-expert-bias", "--moe-router-dtype", "fp32"),
        *("--moe-shared-expert-intermediate-size", str(sizes(config)["shared_ffn"])),
    ]


FAMILY = Family(
    "DeepseekV3ForCausalLM",
    ATTENTION,
    sizes,
    arguments,
    dense=gated("mlp", "mlp", "ffn"),
    routed=ROUTED,
    experts=gated("mlp.experts.{expert}", "mlp.experts.experts", "expert_ffn"),
    has_experts=has_experts,
    fixed=FIXED,
    latent=True,
    mtp=MTP,
)
