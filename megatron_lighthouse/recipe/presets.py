"""The demonstration runs: one for a laptop's CPU, one for a machine with GPUs."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

COMMON = """
    --position-embedding-type rope --normalization RMSNorm --disable-bias-linear --swiglu
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --micro-batch-size 1 --lr-decay-style cosine --clip-grad 1.0
    --weight-decay 0.1 --adam-beta2 0.95 --log-interval 1 --eval-iters 4 --no-create-attention-mask-in-dataloader
"""

ON_CPU = """
    --distributed-backend gloo --transformer-impl local --use-cpu-initialization
    --no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-dropout-fusion
    --no-rope-fusion
"""
"""What Megatron needs to run without a GPU."""

LOCAL = """
    --transformer-impl local --no-persist-layer-norm --no-masked-softmax-fusion
    --recompute-granularity selective --recompute-modules core_attn
"""
"""Megatron's own layers on a GPU. Their attention keeps all scores: recomputed, 16K tokens fit."""

CPU = """
    --context-parallel-size 2
    --num-layers 4 --hidden-size 128 --ffn-hidden-size 384 --init-method-std 0.06
    --num-attention-heads 4 --group-query-attention --num-query-groups 2
    --seq-length 2048 --max-position-embeddings 2048 --global-batch-size 1
    --lr 3e-3 --min-lr 3e-4 --lr-warmup-fraction 0.03
    --lighthouse-budget 64 --lighthouse-tile-budget 16 --lighthouse-dense-first 1 --lighthouse-dense-last 1
"""

GPU = """
    --distributed-backend nccl --bf16
    --num-layers 12 --hidden-size 768 --ffn-hidden-size 2048 --num-attention-heads 6
    --seq-length 16384 --max-position-embeddings 16384
    --lr 1e-3 --min-lr 1e-4 --lr-warmup-fraction 0.04
    --lighthouse-budget 256 --lighthouse-dense-first 2 --lighthouse-dense-last 2
"""


@dataclass(frozen=True)
class Preset:
    """A model, how it is spread over processes, and how long the two stages are."""

    processes: int
    context_parallel: int
    """Processes that share a sequence."""
    steps: int
    """Iterations of stage 1 (Lighthouse)."""
    dense_steps: int
    """Iterations of stage 2 (dense)."""
    arguments: tuple[str, ...]
    """Megatron's command line, less attention, data and output."""


def preset_for(gpus: int) -> Preset:
    """The preset for a machine with this many GPUs; 0 takes two processes on the CPU. Where it can, two share a sequence."""
    if not gpus:
        return Preset(2, 2, 120, 40, tuple((COMMON + ON_CPU + CPU).split()))
    context_parallel = 2 if gpus % 2 == 0 else 1
    arguments = [*(COMMON + GPU).split(), "--graphs", "auto", "--context-parallel-size", str(context_parallel)]
    arguments += ["--global-batch-size", str(2 * gpus // context_parallel)]
    arguments += ["--transformer-impl", "transformer_engine"] if find_spec("transformer_engine") else LOCAL.split()
    if not find_spec("fused_weight_gradient_mlp_cuda"):  # an extension of NVIDIA Apex
        arguments.append("--no-gradient-accumulation-fusion")
    return Preset(gpus, context_parallel, 400, 100, tuple(arguments))


def default_text() -> list[str]:
    """Text that any machine has: the sources of Python's standard library and its language reference."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [*sorted(library.glob("*.py")), library / "pydoc_data" / "topics.py"]
    return [str(file) for file in files if file.is_file()]
