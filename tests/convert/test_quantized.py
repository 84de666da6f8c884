"""Weights in FP8 and MXFP4 become the bf16 that they stand for; layers that predict further tokens are carried or left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lighthouse.convert.__main__ import main
from megatron_lighthouse.convert.families import deepseek_v3, gpt_oss
from megatron_lighthouse.convert.family import Family
from megatron_lighthouse.convert.hugging_face import whole_shape
from megatron_lighthouse.convert.mapping import all_placed
from tests.convert.folders import convert, refusal, tensors_of, write

BLOCK = 16
COMMON: dict[str, Any] = {
    **{"vocab_size": 40, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 128, "dtype": "bfloat16", "tie_word_embeddings": False},
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
GPT_OSS = {
    **{**COMMON, "architectures": ["GptOssForCausalLM"], "attention_bias": True, "head_dim": 16, "sliding_window": 16},
    **{"num_local_experts": 3, "num_experts_per_tok": 2, "quantization_config": {"quant_method": "mxfp4"}},
}
DEEPSEEK = {
    **{**COMMON, "architectures": ["DeepseekV3ForCausalLM"], "num_key_value_heads": 4, "num_nextn_predict_layers": 1},
    **{"q_lora_rank": 24, "kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16},
    **{"n_routed_experts": 4, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "moe_intermediate_size": 24},
    **{"n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5},
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]},
}


def random(family: Family, config: dict[str, Any], mtp: int = 0) -> dict[str, Tensor]:
    """What the table of a family wants."""
    torch.manual_seed(9)
    placed = all_placed(family, config, tied=False, mtp=mtp)
    return {name: torch.randn(whole_shape(one, shape)).bfloat16() for one in placed for name, shape in one.parts.items()}


def test_mxfp4(tmp_path: Path, capsys: Any) -> None:
    stored = random(gpt_oss.FAMILY, GPT_OSS)
    expected = dict(stored)
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inner, rows = stored.pop(name).shape
        blocks = torch.randint(256, (experts, rows, inner // 32, 16), dtype=torch.uint8)
        scales = torch.randint(100, 150, (experts, rows, inner // 32), dtype=torch.uint8)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        expected[name] = _mxfp4(blocks, scales)
    source = write(tmp_path / "hf", stored, GPT_OSS)
    _back_is(expected, source, tmp_path)
    assert "config.json: quantization_config" in capsys.readouterr().out


def _mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """By the bits of e2m1 and e8m0 (OCP Microscaling Formats 1.0), in float64; [E, in, out]."""
    codes = torch.stack([blocks % 16, blocks // 16], dim=-1).flatten(-2).double()
    sign, exponent, mantissa = (codes >= 8).double(), (codes % 8 // 2), codes % 2
    size = torch.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * 2 ** (exponent - 1))
    values = (1 - 2 * sign) * size * 2.0 ** (scales.double().unsqueeze(-1) - 127)
    return values.flatten(-2).mT.bfloat16()


def _fp8(stored: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Quantise each linear layer as DeepSeek does: a scale for BLOCK x BLOCK numbers."""
    for name in [name for name in stored if "_proj" in name and "eh_proj" not in name]:
        weight = (stored[name].float() * 50).to(torch.float8_e4m3fn)
        rows, columns = (-(-n // BLOCK) for n in weight.shape)
        scale = torch.rand(rows, columns) + 0.5
        whole = torch.empty(weight.shape)
        for i in range(weight.shape[0]):
            for j in range(columns):
                part = slice(j * BLOCK, (j + 1) * BLOCK)
                whole[i, part] = weight[i, part].float() * scale[i // BLOCK, j]
        stored |= {name: weight, f"{name}_scale_inv": scale}
        expected[name] = whole.bfloat16()


def test_fp8_and_a_layer_of_further_tokens(tmp_path: Path, capsys: Any) -> None:
    stored = random(deepseek_v3.FAMILY, DEEPSEEK, mtp=1)
    stored["model.layers.1.mlp.gate.e_score_correction_bias"] = torch.randn(4)
    stored["model.layers.2.embed_tokens.weight"] = stored["model.embed_tokens.weight"].clone()
    stored["model.layers.2.shared_head.head.weight"] = stored["lm_head.weight"].clone()
    expected = dict(stored)
    _fp8(stored, expected)
    source = write(tmp_path / "hf", stored, DEEPSEEK, files=3)
    _back_is(expected, source, tmp_path)

    convert("hf-to-megatron", source, tmp_path / "without", "--no-mtp")
    said = capsys.readouterr().out
    assert "left out: model.layers.2.enorm.weight" in said
    assert "--mtp-num-layers" not in (tmp_path / "without/model.args").read_text()
    convert("megatron-to-hf", tmp_path / "without", tmp_path / "shorter")
    assert {*tensors_of(tmp_path / "shorter")} == {name for name in expected if not name.startswith("model.layers.2.")}

    stored["model.layers.2.embed_tokens.weight"] += 1
    other = write(tmp_path / "other", stored, DEEPSEEK)
    assert "differs from model.embed_tokens.weight" in refusal(capsys, "hf-to-megatron", other, tmp_path / "none")


def _back_is(expected: dict[str, Tensor], source: Path, folder: Path) -> None:
    convert("hf-to-megatron", source, folder / "megatron")
    convert("megatron-to-hf", folder / "megatron", folder / "back")
    back = tensors_of(folder / "back")
    assert back.keys() == expected.keys()
    for name, tensor in expected.items():
        assert back[name].dtype == tensor.dtype, name
        assert torch.equal(back[name], tensor), name
    assert "quantization_config" not in json.loads((folder / "back/config.json").read_text())
    assert main(["verify", str(source), str(folder / "back")]) == 0
    assert main(["verify", str(folder / "megatron"), str(folder / "back")]) == 0


@pytest.mark.parametrize(("spoil", "named"), [("missing", "is missing"), ("turned", "has shape")])
def test_scales_that_are_not_whole(spoil: str, named: str, tmp_path: Path, capsys: Any) -> None:
    stored = random(deepseek_v3.FAMILY, DEEPSEEK)
    _fp8(stored, {})
    name = "model.layers.0.mlp.gate_proj.weight_scale_inv"
    scale = stored.pop(name)
    if spoil == "turned":
        stored[name] = scale.T.contiguous()
    line = refusal(capsys, "hf-to-megatron", write(tmp_path / "hf", stored, DEEPSEEK), tmp_path / "megatron")
    assert name in line
    assert named in line
