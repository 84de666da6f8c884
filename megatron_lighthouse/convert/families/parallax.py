"""flash-linear-attention's Parallax: Llama with a second projection of queries, r; by choice with norms and biases."""

from __future__ import annotations

from megatron_lighthouse.convert.families import fla
from megatron_lighthouse.convert.family import Config, Family, Weight

HEAD_NORM_EPS = 1e-5
"""Of the norms of q, k and r, whatever config.json says."""
HEAD_NORMS = {"q": "q_layernorm", "k": "k_layernorm", "r": "r_q_layernorm"}


def weights(config: Config) -> list[Weight]:
    bias = bool(config.get("qkv_bias", False))
    norms = [
        Weight(f"self_attention.{its}.weight", {f"attn.{name}_norm.weight": ("head",)}) for name, its in HEAD_NORMS.items()
    ]
    return [
        *fla.projections("q", "k", "v", bias=bias),
        *fla.stream("r", "q", bias),
        *(norms if config.get("qk_norm", False) else []),
    ]


def arguments(config: Config) -> list[str]:
    normed = config.get("qk_norm", False)
    if normed and config["rms_norm_eps"] != HEAD_NORM_EPS:
        raise ValueError(
            f"config.json's norm_eps {config['rms_norm_eps']} with qk_norm cannot be carried over for ParallaxForCausalLM: its "
            f"norms of q, k and r have {HEAD_NORM_EPS}, and Megatron has one epsilon for all norms: only {HEAD_NORM_EPS} can."
        )
    return [
        *("--attention", "parallax", "--swiglu", "--disable-bias-linear"),
        *(["--add-qkv-bias"] if config.get("qkv_bias", False) else []),
        *(["--qk-layernorm"] if normed else []),
    ]


FAMILY = Family(
    "ParallaxForCausalLM",
    fla.ATTENTION,
    fla.sizes,
    arguments,
    dense=fla.MLP,
    fixed=fla.FIXED,
    further=weights,
    embedding=fla.EMBEDDING,
    common=fla.common,
    plain_rope=True,
)
