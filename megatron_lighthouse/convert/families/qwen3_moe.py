"""Qwen3 with experts."""

from __future__ import annotations

from megatron_lighthouse.convert.families import qwen3
from megatron_lighthouse.convert.family import Config, Family, Weight, gated

ROUTED = [Weight("mlp.router.weight", {"mlp.gate.weight": ("experts", "hidden")})]


def number_of_experts(config: Config) -> int:
    """Transformers 5 writes another name than the files on the hub have."""
    return config["num_experts"] if "num_experts" in config else config["num_local_experts"]


def has_experts(config: Config) -> list[bool]:
    """All layers but `mlp_only_layers`, or each `decoder_sparse_step`th of them."""
    step, without = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    return [(n + 1) % step == 0 and n not in without for n in range(config["num_hidden_layers"])]


def sizes(config: Config) -> dict[str, int]:
    return {
        **qwen3.sizes(config),
        "experts": number_of_experts(config),
        "expert_ffn": config["moe_intermediate_size"],
    }


def arguments(config: Config) -> list[str]:
    words = [
        *qwen3.arguments(config),
        *("--num-experts", str(number_of_experts(config)), "--moe-ffn-hidden-size", str(config["moe_intermediate_size"])),
        *("--moe-router-topk", str(config["num_experts_per_tok"]), "--moe-router-score-function", "softmax"),
    ]
    # of the chosen experts alone, which is the softmax of all, made to sum to one again
    return words if config.get("norm_topk_prob") else [*words, "--moe-router-pre-softmax"]


FAMILY = Family(
    "Qwen3MoeForCausalLM",
    qwen3.ATTENTION,
    sizes,
    arguments,
    dense=gated("mlp", "mlp", "ffn"),
    routed=ROUTED,
    experts=gated("mlp.experts.{expert}", "mlp.experts.experts", "expert_ffn"),
    has_experts=has_experts,
    fixed=qwen3.FIXED,
)
