"""What cannot be converted: one line that names it, status 2, and nothing written."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.convert.folders import LLAMA, convert, refusal, rewrite, weights, write

NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, ["MixtralForCausalLM", "LlamaForCausalLM", "DeepseekV3ForCausalLM"]),
        ({"architectures": None}, ["architectures", "LlamaForCausalLM"]),
        ({"hidden_act": "gelu"}, ["hidden_act gelu", "silu"]),
        ({"attention_bias": True}, ["attention_bias True"]),
        ({"num_hidden_layers": "two"}, ["num_hidden_layers"]),
        ({"hidden_size": -16}, ["hidden_size -16"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads 4", "num_key_value_heads 3"]),
        ({"intermediate_size": 32}, ["mlp.gate_proj.weight", "[24, 16]", "[32, 16]"]),
        ({"num_hidden_layers": 3}, ["lacks model.layers.2.", "4 more"]),
        ({"num_hidden_layers": 1}, ["holds model.layers.1.", "--leave-out"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["awq", "fp8", "mxfp4"]),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, ["longrope", "yarn"]),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, ["dynamic", "yarn"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.5}}, ["2.5"]),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 4.0}},
            ["low_freq_factor 2.0"],
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 2.0}}, ["attention_factor 2.0", "1.13"]),
        ({"rope_theta": 10000.5}, ["10000.5"]),
        ({"rope_scaling": {"type": "linear"}}, ["RoPE of type linear has no factor"]),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["RoPE of its own for full_attention"]),
    ],
)
def test_a_config_that_cannot_be_carried_over(fields: dict[str, Any], named: list[str], tmp_path: Path, capsys: Any) -> None:
    source = write(tmp_path / "hf", weights(), {**LLAMA, **fields})
    line = refusal(capsys, "hf-to-megatron", source, tmp_path / "megatron")
    assert all(name in line for name in named), line
    assert not (tmp_path / "megatron").exists()


@pytest.mark.parametrize(
    "name", ["hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings", "rms_norm_eps"]
)
def test_a_config_that_says_too_little(name: str, tmp_path: Path, capsys: Any) -> None:
    source = write(tmp_path / "hf", weights(), {key: value for key, value in LLAMA.items() if key != name})
    assert name in refusal(capsys, "hf-to-megatron", source, tmp_path / "megatron")


def _without(tensors: Any) -> str:
    del tensors[NORM]
    return f"lacks {NORM}"


def _surplus(tensors: Any) -> str:
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(16)
    return "holds model.layers.0.self_attn.q_proj.bias"


def _turned(tensors: Any) -> str:
    tensors["model.layers.0.mlp.down_proj.weight"] = tensors["model.layers.0.mlp.down_proj.weight"].T.contiguous()
    return "model.layers.0.mlp.down_proj.weight has shape [24, 16], and by config.json [16, 24]"


def _integers(tensors: Any) -> str:
    tensors[NORM] = tensors[NORM].to(torch.int8)
    return NORM


def _mixed(tensors: Any) -> str:
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].float()
    return "several dtypes"


def _no_head(tensors: Any) -> str:
    del tensors["lm_head.weight"]
    return "lacks lm_head.weight"


def _mixed_layers(tensors: Any) -> str:
    tensors[NORM] = tensors[NORM].float()
    return "torch.bfloat16 in one layer and of torch.float32 in another"


@pytest.mark.parametrize("spoil", [_mixed_layers, _without, _surplus, _turned, _integers, _mixed, _no_head])
def test_tensors_that_are_not_the_models(spoil: Any, tmp_path: Path, capsys: Any) -> None:
    tensors = weights()
    named = spoil(tensors)
    assert named in refusal(capsys, "hf-to-megatron", write(tmp_path / "hf", tensors), tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()


def test_a_surplus_tensor_is_left_out_when_told_to(tmp_path: Path, capsys: Any) -> None:
    tensors = weights()
    _surplus(tensors)
    source = write(tmp_path / "hf", tensors)
    convert("hf-to-megatron", source, tmp_path / "megatron", "--leave-out", "*.q_proj.bias")
    assert "left out: model.layers.0.self_attn.q_proj.bias" in capsys.readouterr().out
    line = refusal(capsys, "hf-to-megatron", source, tmp_path / "other", "--leave-out", "*.q_proj.bias", "*.inv_freq")
    assert "--leave-out *.inv_freq is the name of no tensor" in line


def _cut(folder: Path) -> str:
    file = folder / "model-1.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    return "model-1.safetensors is cut"


def _absent(folder: Path) -> str:
    (folder / "model-1.safetensors").unlink()
    return "files that are not there, model-1.safetensors"


def _elsewhere(folder: Path) -> str:
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-1.safetensors", "model-0.safetensors"))
    return "is in model-0.safetensors, and it is not"


def _no_index(folder: Path) -> str:
    (folder / "model.safetensors.index.json").unlink()
    return "holds neither"


def _both(folder: Path) -> str:
    shutil.copy(folder / "model-1.safetensors", folder / "model.safetensors")
    return "holds both"


def _broken_index(folder: Path) -> str:
    (folder / "model.safetensors.index.json").write_text('{"weight_map"')
    return "is no index"


def _broken_config(folder: Path) -> str:
    (folder / "config.json").write_text("{")
    return "config.json is no JSON"


def _no_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return "holds no config.json"


SPOILT = [_cut, _absent, _elsewhere, _no_index, _both, _broken_index, _broken_config, _no_config]


@pytest.mark.parametrize("spoil", SPOILT)
def test_files_that_are_not_whole(spoil: Any, tmp_path: Path, capsys: Any) -> None:
    source = write(tmp_path / "hf", weights(), files=3)
    named = spoil(source)
    assert named in refusal(capsys, "hf-to-megatron", source, tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()


@pytest.fixture
def megatron(tmp_path: Path) -> Path:
    convert("hf-to-megatron", write(tmp_path / "hf", weights()), tmp_path / "megatron")
    return tmp_path / "megatron"


@pytest.mark.parametrize("back", [False, True])
def test_targets_that_must_not_be_written(back: bool, megatron: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    given = ["megatron-to-hf", megatron] if back else ["hf-to-megatron", tmp_path / "hf"]
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    assert "is not empty" in refusal(capsys, *given, full)
    assert "--force would replace" in refusal(capsys, *given, full, "--force")
    assert (full / "mine.txt").read_text() == "mine"
    assert "is a file" in refusal(capsys, *given, full / "mine.txt")
    assert "one within the other" in refusal(capsys, *given, given[1] / "within")
    disk = namedtuple("disk", "total used free")(1 << 30, 1 << 30, 1 << 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)
    assert "GB free" in refusal(capsys, *given, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def _cut_part(folder: Path) -> str:
    part = sorted((folder / "release").glob("*.distcp"))[-1]
    part.write_bytes(part.read_bytes()[:-5])
    return "is not whole"


def _lost_part(folder: Path) -> str:
    sorted((folder / "release").glob("*.distcp"))[0].unlink()
    return "has 0 of"


def _newer_torch(folder: Path) -> str:
    record = folder / "conversion.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "torch": "99.1.0"}))
    return "was written by torch 99.1.0"


def _unreadable(folder: Path) -> str:
    (folder / "release/.metadata").write_bytes(b"\x80\x05spoilt")
    return "newer torch"


def _no_metadata(folder: Path) -> str:
    (folder / "release/.metadata").unlink()
    return "holds no .metadata"


def _no_tracker(folder: Path) -> str:
    (folder / "latest_checkpointed_iteration.txt").unlink()
    return "no checkpoint of Megatron's"


def _odd_tracker(folder: Path) -> str:
    (folder / "latest_checkpointed_iteration.txt").write_text("newest")
    return "'newest', which is no iteration"


def _no_files(folder: Path) -> str:
    shutil.rmtree(folder / "hf")
    return "--like"


def _other_norm(folder: Path) -> str:
    config = folder / "hf/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rms_norm_eps": 1e-6}))
    return "layernorm_epsilon 1e-06"


def _other_shape(folder: Path) -> str:
    config = folder / "hf/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_key_value_heads": 1}))
    return "num_query_groups 1"


SPOILT_BACK = [
    *(
        _cut_part,
        _lost_part,
        _newer_torch,
        _unreadable,
        _no_metadata,
        _no_tracker,
        _odd_tracker,
        _no_files,
        _other_norm,
        _other_shape,
    ),
]


@pytest.mark.parametrize("spoil", SPOILT_BACK)
def test_checkpoints_that_cannot_be_exported(spoil: Any, megatron: Path, tmp_path: Path, capsys: Any) -> None:
    named = spoil(megatron)
    assert named in refusal(capsys, "megatron-to-hf", megatron, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_an_iteration_that_is_not_there(megatron: Path, tmp_path: Path, capsys: Any) -> None:
    assert "there is release" in refusal(capsys, "megatron-to-hf", megatron, tmp_path / "back", "--ckpt-step", "7")


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("qk_l2_norm", True),
        ("rotary_percent", 0.5),
        ("window_size", (128, 0)),
        ("softmax_type", "off-by-one"),
        ("swiglu", False),
    ],
)
def test_a_run_that_computed_another_model(argument: str, value: Any, megatron: Path, tmp_path: Path, capsys: Any) -> None:
    """Its weights do not tell."""
    rewrite(megatron, lambda key, tensor: {key: tensor}, **{argument: value})
    line = refusal(capsys, "megatron-to-hf", megatron, tmp_path / "back")
    assert f"asks for {argument} " in line
    assert f" had {value}: the export would be another model" in line
