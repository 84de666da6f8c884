"""Which parts of a layer Megatron's graphs of layers capture (`--cuda-graph-modules`). Imports no Megatron."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from megatron_lighthouse.mcore.command_line.layers import hybrid_pattern

FLAG, OLDER = "--cuda-graph-modules", "--cuda-graph-scope"
MODULES = ("attn", "mlp", "moe", "moe_router", "moe_preprocess", "mamba")
WHOLE, ITERATION, INFERENCE = "full", "full_iteration", "full_iteration_inference"
"""What older command lines ask for by them: whole layers, and more than these."""
BLOCK = "--inference-cuda-graph-scope block"


def names(args: Any) -> list[str]:
    """Those of arguments, validated or not, or of a TransformerConfig: words, or members of Megatron's enumeration."""
    found = getattr(args, "cuda_graph_scope_deprecated", None) or getattr(args, "cuda_graph_modules", None) or []
    return [found] if isinstance(found, str) else [getattr(one, "name", one) for one in found]


def problems(args: argparse.Namespace, kind: str) -> Iterator[str]:
    """What is not known, or would leave a run without graphs.

    Args:
        kind: Megatron's --cuda-graph-impl.
    """
    flag = OLDER if getattr(args, "cuda_graph_scope_deprecated", None) else FLAG
    found = names(args)
    if unknown := [name for name in found if name not in (*MODULES, WHOLE, ITERATION, INFERENCE)]:
        yield f"{flag} {' '.join(unknown)} is not known: use some of {', '.join(MODULES)}, or leave it out for whole layers."
    without = not getattr(args, "use_checkpoint_args", False) and not hybrid_pattern(args)
    if found == ["mamba"] and kind in ("local", "transformer_engine") and without:
        yield f"{flag} mamba with --cuda-graph-impl {kind} captures Mamba layers alone, and there are none: use attn or mlp."
    scope = getattr(args, "inference_cuda_graph_scope", None)
    if kind == "local" and (getattr(scope, "name", scope) == "block" or INFERENCE in found):
        asked = f"{flag} {INFERENCE}" if INFERENCE in found else BLOCK
        yield f"{asked} with --cuda-graph-impl local, which then captures no layer that trains: leave it out."
