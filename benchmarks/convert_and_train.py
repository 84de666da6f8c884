"""`python benchmarks/convert_and_train.py --folder FOLDER`: a Qwen3-0.6B in, 20 iterations at 32,768 tokens, out; one GPU.

A random checkpoint of Qwen3-0.6B's shape is made by transformers, converted, trained with Lighthouse from `--load` and
`model.args`, converted back, and loaded by transformers, each in a process of its own. Fails where one of them does, where a
loss is not finite, or where transformers misses a tensor. Needs one GPU, `.[hf]`, and 20 GB in --folder, which stays.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from megatron_lighthouse.launch.torchrun import torchrun

MAKE = """
import sys, torch, transformers
torch.manual_seed(1)
config = transformers.Qwen3Config(
    vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=40960, tie_word_embeddings=True, dtype="bfloat16",
    rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
)
transformers.Qwen3ForCausalLM(config).bfloat16().save_pretrained(sys.argv[1])
"""
LOAD = """
import sys, torch, transformers
model, info = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16, output_loading_info=True)
assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
logits = model.cuda()(torch.arange(512, device="cuda")[None]).logits
assert logits.isfinite().all()
print("transformers loads it:", tuple(logits.shape))
"""
TRAIN = """
    --attention lighthouse --lighthouse-scorer dilated --seq-length 32768 --micro-batch-size 1 --global-batch-size 1
    --train-iters 20 --lr 1e-5 --lr-decay-style constant --bf16 --distributed-backend nccl --log-interval 1
    --eval-iters 0 --save-interval 100 --mock-data --tokenizer-type NullTokenizer --vocab-size 151935
    --no-create-attention-mask-in-dataloader --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
"""
LOCAL = "--transformer-impl local --no-persist-layer-norm --no-masked-softmax-fusion"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True)
    convert = ["-m", "megatron_lighthouse.convert"]
    run("-c", MAKE, str(folder / "hf"))
    run(*convert, "hf-to-megatron", str(folder / "hf"), str(folder / "megatron"))
    run(*convert, "verify", str(folder / "hf"), str(folder / "megatron"))
    lines = (folder / "megatron/model.args").read_text().splitlines()
    model = [word for line in lines if not line.startswith("#") for word in line.split()]
    how = ["--transformer-impl", "transformer_engine"] if find_spec("transformer_engine") else LOCAL.split()
    if not find_spec("fused_weight_gradient_mlp_cuda"):
        how.append("--no-gradient-accumulation-fusion")
    where = ["--load", str(folder / "megatron"), "--save", str(folder / "run")]
    run(*torchrun(1)[1:], "-m", "megatron_lighthouse.pretrain_gpt", *model, *TRAIN.split(), *how, *where)
    run(*convert, "megatron-to-hf", str(folder / "run"), str(folder / "back"))
    run("-c", LOAD, str(folder / "back"))


def run(*arguments: str) -> None:
    """Ends the script with the status of what fails."""
    print("$ python", shlex.join(word if len(word) < 200 else "…" for word in arguments), flush=True)
    if status := subprocess.run([sys.executable, *arguments]).returncode:
        raise SystemExit(status)


if __name__ == "__main__":
    main()
