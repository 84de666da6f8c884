"""Folders for the tests of conversions, and the command's own `main` over them. No transformers, no Megatron."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_lighthouse.convert.__main__ import main
from megatron_lighthouse.convert.torch_dist import Part, object_key, stored_arguments
from megatron_lighthouse.convert.torch_dist import write as write_parts
from megatron_lighthouse.convert.torch_dist_reader import TorchDist

LLAMA: dict[str, Any] = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "tie_word_embeddings": False},
    **{"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "hidden_act": "silu"},
    **{"rope_theta": 500000.0, "rope_scaling": None},
}


def weights(config: dict[str, Any] = LLAMA) -> dict[str, Tensor]:
    """Random, as Llama has them: written out here, not taken from the table under test."""
    torch.manual_seed(3)
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    layer = {
        **{"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)},
        **{"self_attn.q_proj.weight": (hidden, hidden), "self_attn.k_proj.weight": (kv, hidden)},
        **{"self_attn.v_proj.weight": (kv, hidden), "self_attn.o_proj.weight": (hidden, hidden)},
        **{"mlp.gate_proj.weight": (ffn, hidden), "mlp.up_proj.weight": (ffn, hidden)},
        "mlp.down_proj.weight": (hidden, ffn),
    }
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    for n in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{n}.{name}": shape for name, shape in layer.items()}
    return {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] = LLAMA, files: int = 1) -> Path:
    """A Hugging Face folder, by the library of the format; of several files with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    if files == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    where = {name: f"model-{n % files}.safetensors" for n, name in enumerate(tensors)}
    for file in {*where.values()}:
        save_file({name: t for name, t in tensors.items() if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def rewrite(folder: Path, change: Callable[[str, Tensor], dict[str, Tensor]], **arguments: Any) -> None:
    """Write a converted checkpoint again, as another run would: what `change` makes of each tensor, and other arguments."""
    stored, args = TorchDist(folder / "release"), stored_arguments(folder / "release")
    assert args is not None
    whole: dict[str, Tensor] = {}
    for key, found in stored.tensors.items():
        whole |= change(key, stored.read(key, [0] * len(found.size), found.size).clone())
    parts = [Part(key, (*t.shape,), (0,) * t.ndim, (*t.shape,), t.dtype, t.clone) for key, t in whole.items()]
    for file in (folder / "release").iterdir():
        file.unlink()
    vars(args).update(arguments)
    write_parts(folder / "release", parts, {object_key("common_state", []): {"args": args}}, lambda count: None)


def convert(*arguments: str | Path) -> None:
    assert main([str(word) for word in arguments]) == 0


def refusal(capsys: Any, *arguments: str | Path) -> str:
    """The one line that a refused conversion prints."""
    capsys.readouterr()
    assert main([str(word) for word in arguments]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    return said[0]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All of a folder, by the library of the format, not by our reader."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
