"""gpt-oss: biases, sinks, every other layer sliding, experts whose rows of gate and up stand in turn."""

from __future__ import annotations

from megatron_lighthouse.convert.families import llama
from megatron_lighthouse.convert.family import Config, Family, Weight, head_sizes
from megatron_lighthouse.convert.forms import DEALT, GROUPED, TURNED

ATTENTION = [
    *llama.ATTENTION,
    Weight(
        "self_attention.linear_qkv.bias",
        {"self_attn.q_proj.bias": ("q",), "self_attn.k_proj.bias": ("kv",), "self_attn.v_proj.bias": ("kv",)},
        GROUPED,
    ),
    Weight("self_attention.linear_proj.bias", {"self_attn.o_proj.bias": ("hidden",)}),
    Weight("self_attention.core_attention.softmax_offset", {"self_attn.sinks": ("heads",)}),
]
ROUTED = [
    Weight("mlp.router.weight", {"mlp.router.weight": ("experts", "hidden")}),
    Weight("mlp.router.bias", {"mlp.router.bias": ("experts",)}),
]
EXPERTS = [
    Weight("mlp.experts.experts.linear_fc1.weight", {"mlp.experts.gate_up_proj": ("hidden", "both")}, DEALT),
    Weight("mlp.experts.experts.linear_fc1.bias", {"mlp.experts.gate_up_proj_bias": ("both",)}, DEALT),
    Weight("mlp.experts.experts.linear_fc2.weight", {"mlp.experts.down_proj": ("ffn", "hidden")}, TURNED),
    Weight("mlp.experts.experts.linear_fc2.bias", {"mlp.experts.down_proj_bias": ("hidden",)}),
]
KINDS = ("full_attention", "sliding_attention")
"""Of layers, as config.json's `layer_types` has them."""
FIXED = {"hidden_act": ("silu",), "attention_bias": (True,), "swiglu_limit": (7.0,), "swiglu_alpha": (1.702,)}


def sizes(config: Config) -> dict[str, int]:
    return {
        **head_sizes(type(config)({"head_dim": 64, **config})),  # type: ignore[call-arg]
        "experts": config["num_local_experts"],
        "both": 2 * config["intermediate_size"],
    }


def arguments(config: Config) -> list[str]:
    layers = range(config["num_hidden_layers"])
    if config["sliding_window"] is None:
        raise ValueError("config.json's sliding_window None cannot be carried over: a number of tokens can.")
    kinds = config.get("layer_types") or ["full_attention" if n % 2 else "sliding_attention" for n in layers]
    if other := sorted({*kinds} - {*KINDS}):
        raise ValueError(f"config.json's layer_types {' and '.join(other)} cannot be carried over: {' and '.join(KINDS)} can.")
    windowed = ",".join(str(int(kind == "sliding_attention")) for kind in kinds)
    return [
        *("--quick-geglu", "--glu-linear-offset", "1.0", "--activation-func-clamp-value", "7.0", "--add-qkv-bias"),
        *("--softmax-type", "learnable"),
        *("--window-size", f"{config['sliding_window'] - 1},0"),  # Megatron counts the tokens before the query
        *("--window-attn-skip-freq", f"[{windowed}]"),
        *("--num-experts", str(config["num_local_experts"]), "--moe-ffn-hidden-size", str(config["intermediate_size"])),
        *("--moe-router-topk", str(config["num_experts_per_tok"]), "--moe-router-score-function", "softmax"),
    ]


FAMILY = Family(
    "GptOssForCausalLM",
    ATTENTION,
    sizes,
    arguments,
    routed=ROUTED,
    experts=EXPERTS,
    has_experts=lambda config: [True] * config["num_hidden_layers"],
    fixed=FIXED,
)
