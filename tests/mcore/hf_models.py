"""Tiny random models by transformers, and what they answer. A process of its own: the stand-in for CUDA spoils its RoPE.

`python -m tests.mcore.hf_models` reads lines: `["make", FOLDER]` writes a folder a model; `["logits", TOKENS, FOLDER, …]` loads
them, in fp32.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy
import torch

VOCAB, LENGTH = 384, 64
"""As many rows as --text-data gives the embedding."""
COMMON: dict[str, Any] = {
    **{"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.1},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    **{"original_max_position_embeddings": 8192, "rope_theta": 500000.0},
}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
YARN = {
    **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0},
    **{"beta_fast": 32.0, "beta_slow": 1.0},
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
DEEPSEEK = {
    "initializer_range": 0.05,  # its logits are then as small as those of the others, and so are their roundings
    **{"q_lora_rank": 32, "kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16},
    **{"num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2},
    **{"moe_intermediate_size": 32, "n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5},
}
LATENT_YARN = {
    **{"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "rope_theta": 10000.0},
    **{"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"vocab_size": 300, "rope_parameters": LLAMA3, "rms_norm_eps": 1e-5}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}),
    "qwen3-tied": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True, "rope_parameters": LINEAR}),
    "qwen3-moe": ("Qwen3Moe", {"head_dim": 16, **EXPERTS}),
    "qwen3-moe-mixed": ("Qwen3Moe", {"head_dim": 16, **EXPERTS, "mlp_only_layers": [1], "norm_topk_prob": False}),
    "gpt-oss": (
        "GptOss",
        {
            **{"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
            **{"layer_types": ["sliding_attention", "full_attention"] * 2, "rope_parameters": {**YARN, "truncate": False}},
        },
    ),
    "deepseek": ("DeepseekV3", {**DEEPSEEK, "rope_parameters": LATENT_YARN}),
    "deepseek-alike": ("DeepseekV3", {**DEEPSEEK, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1}),
}


def make(folder: Path) -> None:
    """A folder a model, and `logits.npy` [models, LENGTH, vocabulary] of `tokens.npy` [LENGTH]."""
    import transformers

    tokens = torch.randint(256, (LENGTH,), generator=torch.Generator().manual_seed(5))
    numpy.save(folder / "tokens.npy", tokens.numpy())
    for seed, (name, (kind, fields)) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        config = getattr(transformers, f"{kind}Config")(**{**COMMON, **fields})
        config._attn_implementation = "eager"
        model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter.ndim == 1 or "bias" in parameter_name or "sinks" in parameter_name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)  # else norms are ones and biases nought
            for buffer_name, buffer in model.named_buffers():
                if "correction_bias" in buffer_name:
                    buffer.add_(torch.randn_like(buffer) * 0.1)
        shards = {"max_shard_size": "100KB"} if name == "qwen3" else {}
        model.save_pretrained(folder / name, **shards)
        if name == "deepseek":
            _add_layer_of_further_tokens(folder / name / "model.safetensors")
        numpy.save(folder / name / "logits.npy", _logits(model, tokens))


def _add_layer_of_further_tokens(file: Path) -> None:
    """As DeepSeek's own files have it, and transformers neither writes nor reads it: a layer after the last."""
    from safetensors.torch import load_file, save_file

    tensors, last = load_file(file), COMMON["num_hidden_layers"]
    hidden = COMMON["hidden_size"]
    before, after = f"model.layers.{last - 1}.", f"model.layers.{last}."
    tensors |= {name.replace(before, after): t * 1.5 for name, t in tensors.items() if name.startswith(before)}
    tensors |= {after + f"{name}.weight": torch.randn(hidden) for name in ("enorm", "hnorm", "shared_head.norm")}
    tensors[after + "eh_proj.weight"] = torch.randn(hidden, 2 * hidden)
    tensors[after + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[after + "shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, file, {"format": "pt"})


def logits(tokens: Path, *folders: Path) -> None:
    """`logits.npy` in each folder, as transformers loads it, in fp32; fails where a tensor is missing, or not the model's."""
    from transformers import AutoModelForCausalLM

    for folder in folders:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        numpy.save(folder / "logits.npy", _logits(model.eval(), torch.from_numpy(numpy.load(tokens))))


@torch.no_grad()
def _logits(model: Any, tokens: torch.Tensor) -> Any:
    return model(tokens.unsqueeze(0)).logits[0].float().numpy()


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        name, *words = json.loads(line)
        {"make": make, "logits": logits}[name](*map(Path, words))
        print("done", file=answers, flush=True)
