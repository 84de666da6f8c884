"""Llama 3, and what has its shape."""

from __future__ import annotations

from megatron_lighthouse.convert.family import Config, Family, Weight, gated, head_sizes
from megatron_lighthouse.convert.forms import GROUPED

QKV = Weight(
    "self_attention.linear_qkv.weight",
    {
        "self_attn.q_proj.weight": ("q", "hidden"),
        "self_attn.k_proj.weight": ("kv", "hidden"),
        "self_attn.v_proj.weight": ("kv", "hidden"),
    },
    GROUPED,
)
ATTENTION = [
    Weight("self_attention.linear_qkv.layer_norm_weight", {"input_layernorm.weight": ("hidden",)}),
    QKV,
    Weight("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": ("hidden", "q")}),
    Weight(
        "mlp.linear_fc1.layer_norm_weight",
        {"post_attention_layernorm.weight": ("hidden",)},
        also=("pre_mlp_layernorm.weight",),  # where a layer has experts
    ),
]
FIXED = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "pretraining_tp": (1,),
}


def arguments(config: Config) -> list[str]:
    return ["--swiglu", "--disable-bias-linear"]


FAMILY = Family("LlamaForCausalLM", ATTENTION, head_sizes, arguments, dense=gated("mlp", "mlp", "ffn"), fixed=FIXED)
