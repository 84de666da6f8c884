"""`python benchmarks/model_steps.py --out FOLDER`: training steps of the models that people train, at 98,304 tokens on one GPU.

Recipes of launch/ (gpt-oss-20b: windows, sinks, experts; DeepSeek's architecture: multi-latent attention, experts; Qwen3-8B:
queries and keys normed), with their first layers alone: dense attention, and Lighthouse in all layers that see the whole
sequence, each in a process of its own through `megatron_lighthouse.pretrain_gpt`. Random tokens. `--runs 'gpt-oss *'` takes
some, in that order. Leaves model_steps.csv, summary.json and the logs. `--tiny` tries it on a CPU, gpt-oss without experts:
Megatron's local ones fail with biases.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from csv_tables import write_csv
from million import GPU, LISTS, measured, prepare

from megatron_lighthouse.launch.torchrun import ROOT
from megatron_lighthouse.plan.words import recipe_words
from megatron_lighthouse.recipe.presets import ON_CPU

MODELS = {"gpt-oss": "gpt-oss-20b-128k", "DeepSeek": "deepseek-16b-128k", "Qwen3": "qwen3-8b-256k"}
ATTENTION = {
    "dense": ["--attention", "dense"],
    "lighthouse": "--attention lighthouse --lighthouse-dense-first 0 --lighthouse-dense-last 0".split(),
}
TIMED = """
    --lr 1e-4 --lr-decay-style constant --lr-warmup-fraction 0 --log-interval 1 --eval-iters 0 --eval-interval 100000
    --num-workers 0 --seed 7
""".split()
"""What a recipe is timed with."""
RANDOM = ("--tokenizer-type", "NullTokenizer", "--split", "100,0,0")
"""Tokens, as million.py writes them."""
ONE_GPU = """
    --context-parallel-size 1 --tensor-model-parallel-size 1 --expert-model-parallel-size 1 --global-batch-size 1
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
""".split()
OF_RANKS = {"--sequence-parallel", "--overlap-grad-reduce", "--overlap-param-gather", "--use-distributed-optimizer"}
"""What a recipe asks of several ranks, without a value."""
RECOMPUTED = ("--recompute-modules", "--save-interval")
TINY = f"""
    {ON_CPU} --transformer-impl local --no-persist-layer-norm --no-masked-softmax-fusion --no-bias-swiglu-fusion
    --no-bias-gelu-fusion --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4
    --lighthouse-levels 2 --lighthouse-budget 8 --lighthouse-tile-budget 4
"""
TINY_OF = {
    "gpt-oss": "--num-query-groups 2 --kv-channels 16 --window-size 30,0",
    "DeepSeek": "--q-lora-rank 32 --kv-lora-rank 32 --qk-head-dim 16 --qk-pos-emb-head-dim 8 --v-head-dim 16 "
    "--num-experts 8 --moe-ffn-hidden-size 64 --moe-shared-expert-intermediate-size 64",
    "Qwen3": "--num-query-groups 2 --kv-channels 16",
}


def without(words: list[str], flags: tuple[str, ...]) -> list[str]:
    """The words but for flags that begin so, and their values."""
    kept, dropped = [], False
    for word in words:
        dropped = word.startswith(flags) if word.startswith("--") else dropped
        kept += [] if dropped else [word]
    return kept


def command(model: str, attention: str, options: argparse.Namespace) -> list[str]:
    """What trains it. Where a flag stands twice, the last counts."""
    words = without(recipe_words(ROOT / "launch" / "recipes" / f"{MODELS[model]}.args"), RECOMPUTED)
    vocabulary = int(words[words.index("--padded-vocab-size") + 1])
    length = 256 if options.tiny else options.seq_length
    words = [word for word in without(words, ("--lighthouse-",)) if word not in OF_RANKS]
    if "--moe-layer-freq" in words:  # as many as there are layers
        words += ["--moe-layer-freq", f"[0]+[1]*{options.layers - 1}"]
    words += ["--seq-length", str(length), "--max-position-embeddings", str(length), "--num-layers", str(options.layers)]
    words += [
        *ONE_GPU,
        *TIMED,
        *RANDOM,
        "--train-iters",
        str(options.steps),
        "--vocab-size",
        str(vocabulary - 1),
        *ATTENTION[attention],
    ]
    if options.tiny:
        experts = ("--num-experts", "--moe-") if model == "gpt-oss" else ("--moe-grouped-gemm",)
        words = [*without(words, ("--bf16", *experts)), *TINY.split(), *TINY_OF[model].split()]
        if attention == "dense":
            words = without(words, ("--lighthouse-",))
    else:
        words += [*GPU.split(), "--attention-backend", "fused"]
    data = ["--data-path", str(options.out / "data" / "random"), "--data-cache-path", str(options.out / "data" / "cache")]
    return [sys.executable, "-m", "megatron_lighthouse.pretrain_gpt", *words, *data]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "model_steps")
    parser.add_argument("--runs", nargs="+", default=["*"], metavar="NAME", help="which, in order; * stands for any letters")
    parser.add_argument("--seq-length", type=int, default=98304)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5, help="iterations a run; the first two are not counted")
    parser.add_argument("--within", type=float, default=3600, metavar="SECONDS", help="what goes on after them is ended")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    known = [(model, attention) for model in MODELS for attention in ("lighthouse", "dense")]
    wanted = list(dict.fromkeys(case for pattern in options.runs for case in known if fnmatch(" ".join(case), pattern)))
    end = time.monotonic() + options.within
    options.out = options.out.resolve()
    environment = prepare(options.out / "data")
    rows: list[dict[str, Any]] = []
    for model, attention in wanted:
        log = options.out / f"{model}-{attention}.log"
        row = measured(command(model, attention, options), log, end, options.seq_length)
        rows.append({"model": model, "attention": attention, "layers": options.layers, "tokens": options.seq_length, **row})
        print({name: value for name, value in rows[-1].items() if name not in LISTS}, flush=True)
        write_csv(options.out / "model_steps.csv", rows, LISTS)
        (options.out / "summary.json").write_text(json.dumps({**environment, "runs": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
