"""Attention to compare with: dense backends of torch and FlashAttention, and the authors' public Lighthouse code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron_lighthouse.softmax.backends import BACKENDS, Attend, inner_attention

PACKAGE = "torchtitan.models.llama3.model"


def dense(name: str, query: Tensor, key: Tensor) -> Attend | None:
    """Dense causal attention by the backend of that name; None where it cannot run."""
    try:
        return inner_attention(name, query, key)
    except ValueError:
        return None


def available(query: Tensor, key: Tensor) -> list[str]:
    """The backends that can run, torch's own choice left out."""
    return [name for name in BACKENDS if name != "sdpa" and dense(name, query, key)]


def authors(path: Path, levels: int, pooling: int, budget: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The authors' layer with the norm scorer, under torch.compile, cuDNN inside.

    Args:
        path: a checkout of their repository, or a folder with its two source files.

    Returns:
        A function of [B, N, H, D] tensors that gives [B, H, N, D].
    """
    module = _load(path)

    class Inner(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    scorer = module.DialatedLighthouseNormScorer(pooling_factor=pooling, levels=levels)
    layer = module.LighthouseLocal(Inner(), scorer, num_levels=levels, pooling_factor=pooling, topk=budget).cuda()
    return torch.compile(layer)


def _load(path: Path) -> Any:
    """Their two files, under the names by which they import each other."""
    source = path / "src" if (path / "src").is_dir() else path
    files = [source / f"lighthouse_selection{suffix}.py" for suffix in ("_cuda", "")]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise SystemExit(f"--reference {path}: {', '.join(missing)} not found; give a checkout of the authors' repository.")
    parts = PACKAGE.split(".")
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        sys.modules.setdefault(name, ModuleType(name)).__path__ = [str(source)]
    return __import__(f"{PACKAGE}.lighthouse_selection", fromlist=["LighthouseLocal"])
