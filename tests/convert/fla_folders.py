"""Tiny models of flash-linear-attention, with the names and fields of its release 0.6.0, and what they answer in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.parallax.oracle import formula as parallax
from tests.wall.oracle import formula as wall

COMMON: dict[str, Any] = {
    **{"attnres_block_size": None, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "dtype": "float32"},
    **{"hidden_act": "swish", "hidden_ratio": 4, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4},
    **{"num_hidden_layers": 2, "num_kv_heads": 2, "tie_word_embeddings": False, "vocab_size": 384, "window_size": None},
    **{"fuse_norm": True, "fuse_swiglu": True, "initializer_range": 0.02, "use_cache": True},
}
PARALLAX = {
    **COMMON,
    **{"architectures": ["ParallaxForCausalLM"], "model_type": "parallax", "norm_eps": 1e-5, "qk_norm": True},
    **{"qkv_bias": True, "rope_theta": 10000.0, "max_position_embeddings": None},
}
WALL = {
    **COMMON,
    **{"architectures": ["WallTransformerForCausalLM"], "model_type": "wall_transformer", "norm_eps": 1e-6, "qk_norm": False},
    **{"qkv_bias": False, "use_output_gate": True, "use_scalar_gate": True, "gate_init_bias": 2.0, "elementwise_affine": True},
}
CONFIGS = {"parallax": PARALLAX, "wall": WALL}


def weights(config: dict[str, Any]) -> dict[str, Tensor]:
    """Random fp32, written out here, not taken from the table under test."""
    hidden, vocab, heads = config["hidden_size"], config["vocab_size"], config["num_heads"]
    inner = config["intermediate_size"] or 256
    kv = hidden // heads * config["num_kv_heads"]
    rows = {"q": hidden, "k": kv, "v": kv, "o": hidden}
    biased = ["q", "k", "v", "r"] if config["qkv_bias"] else []
    if config["model_type"] == "parallax":
        rows |= {"r": hidden}
    else:
        rows |= {"g": hidden}
        rows |= {"gs": heads} if config["use_scalar_gate"] else {}
        rows |= {"o_gate": hidden} if config["use_output_gate"] else {}
        biased += ["g", "gs"]
    layer = {f"attn.{name}_proj.weight": (n, hidden) for name, n in rows.items()}
    layer |= {f"attn.{name}_proj.bias": (rows[name],) for name in biased if name in rows}
    layer |= {f"attn.{name}_norm.weight": (hidden // heads,) for name in ("q", "k", "r") if config["qk_norm"]}
    layer |= {"attn_norm.weight": (hidden,), "mlp_norm.weight": (hidden,), "mlp.down_proj.weight": (hidden, inner)}
    layer |= {f"mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
    shapes = {"model.embeddings.weight": (vocab, hidden), "model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    for n in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{n}.{name}": shape for name, shape in layer.items()}
    made = torch.Generator().manual_seed(4)
    return {name: torch.randn(shape, generator=made) * 0.07 + ("norm" in name) for name, shape in shapes.items()}


def logits(tensors: dict[str, Tensor], config: dict[str, Any], tokens: Tensor) -> Tensor:
    """[tokens, vocabulary] in float64, as fla/layers and fla/models compute it."""
    held = {name: tensor.double() for name, tensor in tensors.items()}
    hidden = held["model.embeddings.weight"][tokens]
    for n in range(config["num_hidden_layers"]):
        layer = {name.removeprefix(f"model.layers.{n}."): tensor for name, tensor in held.items()}
        normed = rms(hidden, layer["attn_norm.weight"], config["norm_eps"])
        hidden = hidden + _attention(layer, config, normed)
        normed = rms(hidden, layer["mlp_norm.weight"], config["norm_eps"])
        gate, up = (normed @ layer[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        hidden = hidden + (torch.nn.functional.silu(gate) * up) @ layer["mlp.down_proj.weight"].T
    return rms(hidden, held["model.norm.weight"], config["norm_eps"]) @ held["lm_head.weight"].T


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def _attention(layer: dict[str, Tensor], config: dict[str, Any], x: Tensor) -> Tensor:
    dim = config["hidden_size"] // config["num_heads"]

    def projected(name: str) -> Tensor:
        y = x @ layer[f"attn.{name}_proj.weight"].T
        return y + layer[f"attn.{name}_proj.bias"] if f"attn.{name}_proj.bias" in layer else y

    def heads(name: str) -> Tensor:
        """[N, 1, heads, D]; normed with 1e-5 whatever norm_eps is."""
        y = projected(name).unflatten(-1, (-1, dim))
        norm = layer.get(f"attn.{name}_norm.weight")
        return (y if norm is None else rms(y, norm, 1e-5)).unsqueeze(1)

    value = heads("v")
    if config["model_type"] == "parallax":
        turn = _turn(len(x), dim, config["rope_theta"])
        out = parallax(*(turn(heads(name)) for name in ("q", "r", "k")), value)
    else:
        gate = torch.nn.functional.logsigmoid(heads("g"))
        scalar = torch.nn.functional.logsigmoid(projected("gs")).unsqueeze(1) if config["use_scalar_gate"] else None
        out = wall(heads("q"), heads("k"), value, gate, scalar)
    out = out.flatten(1)
    if config.get("use_output_gate"):
        out = projected("o_gate").sigmoid() * out
    return out @ layer["attn.o_proj.weight"].T


def _turn(tokens: int, dim: int, base: float) -> Callable[[Tensor], Tensor]:
    """RoPE of the two halves of a head's channels."""
    angles = torch.arange(tokens).double().unsqueeze(1) / base ** (torch.arange(0, dim, 2).double() / dim)
    cos, sin = angles.cos()[:, None, None], angles.sin()[:, None, None]

    def turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    return turned
