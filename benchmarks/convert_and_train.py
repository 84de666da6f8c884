"""`python benchmarks/convert_and_train.py --folder FOLDER`: a Qwen3-0.6B in, 20 iterations at 32,768 tokens, out; one GPU.

A random checkpoint of Qwen3-0.6B's shape is made by transformers, converted, trained with Lighthouse from `--load` and
`model.args`, converted back, and loaded by transformers, each in a process of its own, whose seconds are printed. Fails where
one of them does, where a loss is not finite, or where transformers misses a tensor. Needs one GPU, `.[hf]`, and 6 GB in
--folder, which stays. `--tiny` does all of it in small on a CPU, in a minute or two.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_lighthouse.launch.torchrun import ROOT, torchrun
from megatron_lighthouse.recipe.presets import ON_CPU

MAKE = """
import json, sys, torch, transformers
torch.manual_seed(1)
config = transformers.Qwen3Config(
    max_position_embeddings=40960, tie_word_embeddings=True, dtype="bfloat16",
    rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}, **json.loads(sys.argv[2]),
)
torch.set_default_dtype(torch.bfloat16)
transformers.Qwen3ForCausalLM(config).save_pretrained(sys.argv[1])
"""
LOAD = """
import sys, torch, transformers
model, info = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16, output_loading_info=True)
assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
device = "cuda" if torch.cuda.is_available() else "cpu"
with torch.no_grad():
    logits = model.to(device)(torch.arange(256, device=device)[None]).logits
assert logits.isfinite().all()
print("transformers loads it:", tuple(logits.shape))
"""
QWEN3: dict[str, int] = {
    **{"vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28},
    **{"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128},
}
TINY_QWEN3 = {
    **{"vocab_size": 384, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
}
TRAIN = """
    --attention lighthouse --lighthouse-scorer auto --micro-batch-size 1 --global-batch-size 1
    --train-iters 20 --lr 1e-5 --lr-decay-style constant --bf16 --log-interval 1 --mock-data
    --eval-interval 1000 --eval-iters 0 --save-interval 100 --no-save-optim --no-save-rng
    --tokenizer-type NullTokenizer --no-create-attention-mask-in-dataloader
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
"""
LENGTH = ["--seq-length", "32768", "--distributed-backend", "nccl"]
TINY_LENGTH = "--seq-length 256 --lighthouse-budget 8 --lighthouse-tile-budget 4".split()
LOCAL = "--transformer-impl local --no-persist-layer-norm --no-masked-softmax-fusion"
ITERATION = re.compile(r"elapsed time per iteration \(ms\): (\S+) .* lm loss: (\S+)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="a file for the seconds and losses, as JSON")
    parser.add_argument("--tiny", action="store_true", help="a small model and 256 tokens, on a CPU")
    options = parser.parse_args()
    found = steps(options.folder, TINY_QWEN3 if options.tiny else QWEN3, options.tiny)
    print(json.dumps(found, indent=2))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=2) + "\n")


def steps(folder: Path, model: dict[str, int], tiny: bool) -> dict[str, Any]:
    """Seconds of each, and the losses."""
    folder.mkdir(parents=True)
    hf, megatron, trained, back = (folder / name for name in ("hf", "megatron", "run", "back"))
    convert = ["-m", "megatron_lighthouse.convert"]
    seconds = {"make": run("-c", MAKE, str(hf), json.dumps(model))[0]}
    seconds["hf-to-megatron"] = run(*convert, "hf-to-megatron", str(hf), str(megatron))[0]
    seconds["verify"] = run(*convert, "verify", str(hf), str(megatron))[0]
    where = ["--load", str(megatron), "--save", str(trained), "--data-cache-path", str(folder / "cache")]
    seconds["train"], log = run(
        *torchrun(1)[1:], "-m", "megatron_lighthouse.pretrain_gpt", *training(megatron, model, tiny), *where
    )
    seconds["megatron-to-hf"] = run(*convert, "megatron-to-hf", str(trained), str(back))[0]
    seconds["load"] = run("-c", LOAD, str(back))[0]
    iterations = [(float(milliseconds), float(loss)) for milliseconds, loss in ITERATION.findall(log)]
    times, losses = zip(*iterations, strict=True)
    found = {"model": model, "torch": version("torch"), "transformers": version("transformers"), "seconds": seconds}
    return {**found, "iteration_ms": times, "losses": losses}


def training(megatron: Path, model: dict[str, int], tiny: bool) -> list[str]:
    """The command line of the run, but for its folders."""
    lines = (megatron / "model.args").read_text().splitlines()
    given = [word for line in lines if not line.startswith("#") for word in line.split()]
    how = ["--transformer-impl", "transformer_engine"] if find_spec("transformer_engine") else LOCAL.split()
    if not find_spec("fused_weight_gradient_mlp_cuda"):  # an extension of NVIDIA Apex
        how.append("--no-gradient-accumulation-fusion")
    if tiny:
        how = [*ON_CPU.split(), "--no-bias-swiglu-fusion"]
    length = TINY_LENGTH if tiny else LENGTH
    return [*given, *TRAIN.split(), *length, *how, "--vocab-size", str(model["vocab_size"] - 1)]


def run(*arguments: str) -> tuple[float, str]:
    """Its seconds and what it printed; ends the script with the status of what fails."""
    print("$ python", _shown(arguments), flush=True)
    start, said = time.perf_counter(), []
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONPATH": path},
    ) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            said.append(line)
    if process.returncode:
        raise SystemExit(process.returncode)
    seconds = round(time.perf_counter() - start, 1)
    print(f"{seconds} s", flush=True)
    return seconds, "".join(said)


def _shown(arguments: Sequence[str]) -> str:
    return shlex.join(word if len(word) < 200 else "…" for word in arguments)


if __name__ == "__main__":
    main()
