"""What a table of a family says: which tensors of Hugging Face make which tensor of Megatron."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_lighthouse.convert.forms import ONE, STACKED, Form

type Config = Mapping[str, Any]
"""A config.json."""
type Shape = tuple[str, ...]
"""In names of sizes."""


@dataclass(frozen=True)
class Weight:
    """One tensor of Megatron's, by its name within a layer or the model."""

    megatron: str
    """Its name in a checkpoint, as the local layer spec has it."""
    parts: Mapping[str, Shape]
    """The tensors of Hugging Face that it is made of, by name within a layer or the model. `{expert}` is an expert's number."""
    form: Form = ONE
    also: tuple[str, ...] = ()
    """Names under which Transformer Engine's layer specs look for it."""


@dataclass(frozen=True)
class Family:
    """A kind of model. Tables, and what its config.json means."""

    architecture: str
    """As in config.json's `architectures`."""
    attention: Sequence[Weight]
    """Of each layer: attention, and both norms."""
    sizes: Callable[[Config], dict[str, int]]
    """At least hidden and vocab."""
    arguments: Callable[[Config], list[str]]
    """Megatron's, beside those that all families have (`arguments.py`)."""
    dense: Sequence[Weight] = ()
    """Of a layer without experts, beside `attention`."""
    routed: Sequence[Weight] = ()
    """Of a layer with experts: router, shared experts."""
    experts: Sequence[Weight] = ()
    """Of each expert. Parts without `{expert}` in their name are whole: the first axis counts experts."""
    has_experts: Callable[[Config], list[bool]] = lambda config: [False] * config["num_hidden_layers"]
    """Of each layer."""
    fixed: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Fields of config.json, and the values that can be carried over. A field that is not there is as the first of them."""
    latent: bool = False
    """Multi-latent attention, whose RoPE Megatron takes by other names."""
    further: Callable[[Config], Sequence[Weight]] = lambda config: ()
    """Of each layer beside `attention`, where config.json asks for it."""
    embedding: str = "model.embed_tokens.weight"
    """Its name."""
    common: Callable[[Config], Config] = lambda config: config
    """config.json with the fields that all families have, under their names."""
    positions: bool = True
    """Whether it has RoPE, and so a length."""
    plain_rope: bool = False
    """Whether its config.json says no more of RoPE than its base, and may say no length."""
    mtp: Sequence[Weight] = ()
    """Of each layer that predicts further tokens, beside what the layer itself holds."""


def gated(prefix: str, megatron: str, width: str) -> list[Weight]:
    """A gated MLP without biases: `prefix` and `megatron` are its names, `width` the name of its inner size."""
    gate_up: dict[str, Shape] = {f"{prefix}.{name}_proj.weight": (width, "hidden") for name in ("gate", "up")}
    return [
        Weight(f"{megatron}.linear_fc1.weight", gate_up, STACKED),
        Weight(f"{megatron}.linear_fc2.weight", {f"{prefix}.down_proj.weight": ("hidden", width)}),
    ]


def head_sizes(config: Config) -> dict[str, int]:
    """Sizes of a model with grouped queries."""
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    head = config.get("head_dim") or config["hidden_size"] // heads
    return {
        **{"hidden": config["hidden_size"], "vocab": config["vocab_size"], "ffn": config["intermediate_size"]},
        **{"heads": heads, "groups": groups, "head": head, "q": heads * head, "kv": groups * head},
    }
