"""Qwen3: Llama with a norm of each head's queries and keys."""

from __future__ import annotations

from megatron_lighthouse.convert.families import llama
from megatron_lighthouse.convert.family import Config, Family, Weight, gated, head_sizes

ATTENTION = [
    *llama.ATTENTION,
    Weight("self_attention.q_layernorm.weight", {"self_attn.q_norm.weight": ("head",)}),
    Weight("self_attention.k_layernorm.weight", {"self_attn.k_norm.weight": ("head",)}),
]
FIXED = {"hidden_act": ("silu",), "attention_bias": (False,), "use_sliding_window": (False,)}


def sizes(config: Config) -> dict[str, int]:
    # the class's own default, not hidden_size / heads
    return head_sizes(type(config)({"head_dim": 128, **config}))  # type: ignore[call-arg]


def arguments(config: Config) -> list[str]:
    return ["--swiglu", "--disable-bias-linear", "--qk-layernorm"]


FAMILY = Family("Qwen3ForCausalLM", ATTENTION, sizes, arguments, dense=gated("mlp", "mlp", "ffn"), fixed=FIXED)
