"""What the models of flash-linear-attention have in common, and whether a dense model with further projections is one of them.

Names and fields as in its release 0.6.0 (https://github.com/fla-org/flash-linear-attention, fla/models).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from megatron_lighthouse.convert.family import Config, Weight, gated, head_sizes
from megatron_lighthouse.convert.forms import GROUPED

EMBEDDING = "model.embeddings.weight"
MLP = gated("mlp", "mlp", "ffn")
NAMES = {"num_attention_heads": "num_heads", "num_key_value_heads": "num_kv_heads", "rms_norm_eps": "norm_eps"}
"""Of fields that other families have, and what they are called here."""
FIXED = {
    **{"hidden_act": ("swish",), "window_size": (None,), "attnres_block_size": (None,), "elementwise_affine": (True,)},
    **{"rope_scaling": (None,), "rope_parameters": (None,), "quantization_config": (None,)},
}
MULTIPLE = 256
"""Of which an inner size is that config.json does not say."""
ATTENTION = [
    Weight("self_attention.linear_qkv.layer_norm_weight", {"attn_norm.weight": ("hidden",)}),
    Weight("self_attention.linear_proj.weight", {"attn.o_proj.weight": ("hidden", "q")}),
    Weight("mlp.linear_fc1.layer_norm_weight", {"mlp_norm.weight": ("hidden",)}),
]
ARCHITECTURES = {
    ("r",): ("ParallaxForCausalLM", "parallax"),
    ("g",): ("WallTransformerForCausalLM", "wall_transformer"),
    ("g", "gs"): ("WallTransformerForCausalLM", "wall_transformer"),
}
"""By the projections besides q, k and v: architecture and model_type."""


def projections(*names: str, bias: bool) -> list[Weight]:
    """linear_qkv of these, in Megatron's order, each with the heads of queries or, for k and v, of keys."""
    kinds: dict[str, tuple[str, ...]] = {"weight": ("hidden",), **({"bias": ()} if bias else {})}
    heads = {name: "kv" if name in ("k", "v") else "q" for name in names}
    return [
        Weight(
            f"self_attention.linear_qkv.{kind}",
            {f"attn.{name}_proj.{kind}": (heads[name], *rest) for name in names},
            GROUPED,
        )
        for kind, rest in kinds.items()
    ]


def stream(name: str, rows: str, bias: bool) -> list[Weight]:
    """A further projection, whose rows stand in plain order of heads."""
    weight = Weight(f"self_attention.linear_{name}.weight", {f"attn.{name}_proj.weight": (rows, "hidden")})
    return [weight, *([Weight(f"self_attention.linear_{name}.bias", {f"attn.{name}_proj.bias": (rows,)})] if bias else [])]


def common(config: Config) -> Config:
    """With the fields that all families have, under their names."""
    there = {name: config[here] for name, here in NAMES.items() if config.get(here) is not None}
    inner = config.get("intermediate_size")
    if inner is None:
        inner = int(config["hidden_size"] * (config.get("hidden_ratio") or 4) * 2 / 3)
        inner = MULTIPLE * -(-inner // MULTIPLE)
    fields = {name: value for name, value in config.items() if value is not None}
    return type(config)({**fields, "rms_norm_eps": 1e-6, **there, "intermediate_size": inner})  # type: ignore[call-arg]


def sizes(config: Config) -> dict[str, int]:
    """Heads have hidden_size / num_heads channels."""
    return head_sizes(type(config)({**config, "head_dim": None}))  # type: ignore[call-arg]


def streams_of(there: Collection[str]) -> tuple[str, ...]:
    """The projections besides q, k and v, by a checkpoint's keys."""
    return tuple(name for name in ("r", "g", "gs") if any(f".linear_{name}." in key for key in there))


def with_streams(config: Config, streams: tuple[str, ...], args: Any) -> Config:
    """config.json of the model that a run made of one without `streams`.

    Raises:
        ValueError: flash-linear-attention has no such model.
    """
    was = config["architectures"][0]
    named = ", ".join(f"linear_{name}" for name in streams)
    if streams not in ARCHITECTURES or was not in ("LlamaForCausalLM", "Qwen3ForCausalLM"):
        raise ValueError(f"the checkpoint holds {named}, for which {was} has no place, nor flash-linear-attention a model.")
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    width = config.get("head_dim") or (128 if was == "Qwen3ForCausalLM" else hidden // heads)
    architecture, kind = ARCHITECTURES[streams]
    if heads * width != hidden:
        raise ValueError(
            f"config.json's head_dim {width} cannot be carried over for {architecture}, which {named} makes of the model: only "
            f"hidden_size / num_attention_heads, {hidden // heads}, can."
        )
    shared = ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size", "max_position_embeddings")
    kept = ("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "initializer_range")
    made: dict[str, Any] = {
        **{"architectures": [architecture], "model_type": kind, **{name: config[name] for name in shared}},
        **{name: config[name] for name in kept if name in config},
        **{"num_heads": heads, "num_kv_heads": config.get("num_key_value_heads"), "norm_eps": config["rms_norm_eps"]},
        **{"hidden_act": "swish", "qk_norm": was == "Qwen3ForCausalLM", "qkv_bias": False, "window_size": None},
    }
    if kind == "parallax":
        from megatron_lighthouse.convert.rope import parameters

        made["rope_theta"] = float(parameters(config)["rope_theta"])
    else:
        del made["max_position_embeddings"]
        made["use_scalar_gate"], made["use_output_gate"] = "gs" in streams, bool(getattr(args, "attention_output_gate", False))
        made["gate_init_bias"] = float(getattr(args, "wall_gate_bias", 8.0))
    return type(config)(made)  # type: ignore[call-arg]
