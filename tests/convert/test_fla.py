"""Models of flash-linear-attention both ways, and dense models that a run made into one of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.convert import fla_folders
from tests.convert.fla_folders import PARALLAX, WALL
from tests.convert.folders import LLAMA, convert, refusal, rewrite, tensors_of, weights, write

PLAIN = {"qk_norm": False, "qkv_bias": False, "use_output_gate": False, "use_scalar_gate": False}
CONFIGS = {
    "parallax": PARALLAX,
    "wall": WALL,
    "parallax-plain": {**PARALLAX, **PLAIN, "intermediate_size": None, "max_position_embeddings": 128, "norm_eps": 1e-6},
    "wall-plain": {**WALL, **PLAIN},
    "wall-biased": {**WALL, **PLAIN, "qkv_bias": True},
    "wall-windowed": {**WALL, **PLAIN, "window_size": 64},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_number_comes_back(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    source = write(tmp_path / "hf", fla_folders.weights(config), config)
    convert("hf-to-megatron", source, tmp_path / "megatron")
    convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "back")
    before, after = tensors_of(source), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    assert json.loads((tmp_path / "back/config.json").read_text()) == config


def test_a_window_counts_the_token_itself(tmp_path: Path, capsys: Any) -> None:
    """And a run of another goes nowhere."""
    config = CONFIGS["wall-windowed"]
    source = write(tmp_path / "hf", fla_folders.weights(config), config)
    convert("hf-to-megatron", source, tmp_path / "megatron")
    assert "--window-size 63,0" in (tmp_path / "megatron/model.args").read_text()
    rewrite(tmp_path / "megatron", lambda key, tensor: {key: tensor}, window_size=(31, 0))
    line = refusal(capsys, "megatron-to-hf", tmp_path / "megatron", tmp_path / "back")
    assert "window_size (63, 0)" in line


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({**PARALLAX, "window_size": 64}, ["window_size 64"]),
        ({**PARALLAX, "attnres_block_size": 4}, ["attnres_block_size 4"]),
        ({**PARALLAX, "hidden_act": "powlu"}, ["hidden_act powlu", "swish"]),
        ({**PARALLAX, "norm_eps": 1e-6}, ["norm_eps 1e-06", "qk_norm", "1e-05"]),
        ({**WALL, "qk_norm": True}, ["qk_norm True"]),
        ({**WALL, "qkv_bias": True}, ["qkv_bias True", "use_output_gate"]),
    ],
)
def test_what_megatron_has_no_option_for(config: dict[str, Any], named: list[str], tmp_path: Path, capsys: Any) -> None:
    source = write(tmp_path / "hf", fla_folders.weights({**config, "qk_norm": config["model_type"] == "parallax"}), config)
    line = refusal(capsys, "hf-to-megatron", source, tmp_path / "megatron")
    assert all(name in line for name in named), line


def _trained(folder: Path, new: dict[str, tuple[int, ...]], **arguments: Any) -> dict[str, torch.Tensor]:
    """Write a converted checkpoint again as a run would that added projections to its layers; the projections."""
    config = json.loads((folder / "hf/config.json").read_text())
    layers = config["num_hidden_layers"]
    added = {f"decoder.layers.self_attention.{name}": torch.randn(layers, *shape).bfloat16() for name, shape in new.items()}

    def with_new(key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if "pre_mlp_layernorm" in key:  # written for models with experts; no run writes it
            return added
        return {key: tensor}

    rewrite(folder, with_new, **arguments)
    return added


def test_a_llama_that_was_trained_with_r_is_parallax(tmp_path: Path) -> None:
    source = write(tmp_path / "hf", weights(), LLAMA)
    convert("hf-to-megatron", source, tmp_path / "megatron")
    added = _trained(tmp_path / "megatron", {"linear_r.weight": (16, 16)}, attention="lighthouse", max_position_embeddings=512)
    convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "fla")
    after = tensors_of(tmp_path / "fla")
    r = added["decoder.layers.self_attention.linear_r.weight"]
    assert torch.equal(after["model.layers.1.attn.r_proj.weight"], r[1])
    for here, was in {"attn.k_proj": "self_attn.k_proj", "attn_norm": "input_layernorm", "mlp.up_proj": "mlp.up_proj"}.items():
        assert torch.equal(after[f"model.layers.1.{here}.weight"], weights()[f"model.layers.1.{was}.weight"])
    config = json.loads((tmp_path / "fla/config.json").read_text())
    said = {"num_heads": 4, "num_kv_heads": 2, "rope_theta": 500000.0, "max_position_embeddings": 512, "norm_eps": 1e-5}
    assert config | said == config
    assert config["architectures"] == ["ParallaxForCausalLM"]
    convert("hf-to-megatron", tmp_path / "fla", tmp_path / "again")
    convert("verify", tmp_path / "fla", tmp_path / "again")


def test_a_llama_that_was_trained_with_gates_is_wall(tmp_path: Path) -> None:
    source = write(tmp_path / "hf", weights(), LLAMA)
    convert("hf-to-megatron", source, tmp_path / "megatron")
    gates = {"linear_g.weight": (16, 16), "linear_g.bias": (16,), "linear_gs.weight": (4, 16), "linear_gs.bias": (4,)}
    how = {"attention": "wall", "position_embedding_type": "none", "wall_gate_bias": 5.0, "wall_gate_max": 0.0}
    _trained(tmp_path / "megatron", gates, **how, wall_scalar_gate=True)
    convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "fla")
    config = json.loads((tmp_path / "fla/config.json").read_text())
    said = {"model_type": "wall_transformer", "use_scalar_gate": True, "use_output_gate": False, "gate_init_bias": 5.0}
    assert config | said == config
    assert not {"rope_theta", "max_position_embeddings"} & config.keys()
    assert {*tensors_of(tmp_path / "fla")} == {*fla_folders.weights({**WALL, **PLAIN, "use_scalar_gate": True})}


@pytest.mark.parametrize(
    ("fields", "new", "arguments", "named"),
    [
        ({"head_dim": 8}, {"linear_r.weight": (32, 16)}, {}, ["head_dim 8", "ParallaxForCausalLM", "linear_r"]),
        ({}, {"linear_x.weight": (16, 16)}, {}, ["linear_x.weight", "LlamaForCausalLM has not"]),
        ({}, {"linear_gs.weight": (4, 16)}, {}, ["linear_gs", "nor flash-linear-attention"]),
        (
            {},
            {"linear_g.weight": (16, 16), "linear_g.bias": (16,)},
            {"wall_gate_max": 0.86, "position_embedding_type": "none"},
            ["wall_gate_max 0.0", "0.86"],
        ),
        (
            {},
            {"linear_g.weight": (8, 16), "linear_g.bias": (8,)},
            {"wall_tied_gates": True, "position_embedding_type": "none"},
            ["linear_g.weight has shape", "[2, 16, 16]"],
        ),
        (
            {},
            {"linear_g.weight": (8, 16), "linear_g.bias": (8,)},
            {"wall_paired_gates": True, "position_embedding_type": "rope"},
            ["linear_g.weight has shape", "[2, 16, 16]"],
        ),
        (
            {},
            {"linear_r.weight": (16, 16)},
            {"use_rope_scaling": True, "rope_scaling_factor": 8.0},
            ["llama3", "ParallaxForCausalLM"],
        ),
    ],
)
def test_projections_without_a_place(
    fields: dict[str, Any],
    new: dict[str, tuple[int, ...]],
    arguments: dict[str, Any],
    named: list[str],
    tmp_path: Path,
    capsys: Any,
) -> None:
    config = {**LLAMA, **fields}
    tensors = weights(config)
    if "head_dim" in fields:
        rows = config["head_dim"] * config["num_attention_heads"]
        kv = config["head_dim"] * config["num_key_value_heads"]
        for n in range(2):
            for name, shape in {"q": (rows, 16), "k": (kv, 16), "v": (kv, 16), "o": (16, rows)}.items():
                tensors[f"model.layers.{n}.self_attn.{name}_proj.weight"] = torch.randn(shape).bfloat16()
    source = write(tmp_path / "hf", tensors, config)
    convert("hf-to-megatron", source, tmp_path / "megatron")
    _trained(tmp_path / "megatron", new, **arguments)
    line = refusal(capsys, "megatron-to-hf", tmp_path / "megatron", tmp_path / "fla")
    assert all(name in line for name in named), line
