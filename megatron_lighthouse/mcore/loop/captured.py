"""CUDA graphs while a run trains: what capturing took is said, and at a switch of stage they are captured again."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.full_cuda_graph import FullCudaGraphWrapper
from megatron.core.transformer import cuda_graphs
from megatron.core.transformer.cuda_graphs import CudaGraphManager
from megatron.core.utils import get_model_config

from megatron_lighthouse.notice import say_once

_pool: list[Any] = []
"""Where graphs of whole iterations have their memory, once there is one."""


def of_layers(create: Callable[[], dict[str, float] | None]) -> dict[str, float] | None:
    """Around what Megatron does at the end of every schedule (`local`): it captures in the first iteration."""
    found = create()
    if found:
        _say("layers", found["time"], found["reserved_bytes"])
    return found


def by_helper(create: Callable[..., Any], helper: Any) -> Any:
    """Around the helper of `transformer_engine`, which is called once."""
    return _timed("layers", lambda: True, lambda: create(helper))


def of_iteration(call: Callable[..., Any], graph: Any, *rest: Any, **named: Any) -> Any:
    """Around Megatron's graph of whole iterations (`full_iteration`), which is captured after some without it."""
    kind = "validation" if named["forward_only"] else "training"
    missing = graph.cuda_graph[kind] is None
    if missing and graph.curr_iter(kind) == graph.cuda_graph_warmup_steps:
        _gather_again(named["model"])
    return _timed(
        f"iterations of {kind}", lambda: missing and graph.cuda_graph[kind] is not None, lambda: call(graph, *rest, **named)
    )


def pool(get: Callable[[bool], Any], single: bool) -> Any:
    """Around what tells Megatron's graphs of whole iterations their pool: `forget` ends it, and its is for ever.

    torch captures into no pool all of whose graphs are gone.
    """
    if single and not _pool:
        _pool.append(torch.cuda.graph_pool_handle())
    return _pool[0] if single else get(single)


def _gather_again(model: Any) -> None:
    """Have the iteration that is captured now gather the weights (--overlap-param-gather).

    Else it would not where they were gathered just before it, for an evaluation or a checkpoint: nor would any replay.
    """
    for chunk in model if isinstance(model, list) else [model]:
        # of --overlap-param-gather-with-optimizer-step they are under way already
        if getattr(chunk, "use_forward_hook", False) and not chunk.overlap_param_gather_with_optimizer_step:
            chunk.reset_param_sync_dispatch_state()


def forget(model: Sequence[torch.nn.Module]) -> None:
    """Let go of what was captured: the next iterations run without, and are captured as the first ones were.

    Args:
        model: this rank's chunks of it.
    """
    if cuda_graphs._CudagraphGlobalRecord.cudagraph_created:
        torch.cuda.synchronize()  # what is repeated just now must end before its memory goes
        managers = [m for chunk in model for m in chunk.modules() if isinstance(m, CudaGraphManager)]
        for manager in managers:
            manager.cudagraph_runners.clear()
            manager.custom_cudagraphs_lookup_table.clear()
        cuda_graphs.delete_cuda_graphs()
        _forget_uses()
        # a first manager makes for all a pool, a stream for what comes before a capture, and notes of what is kept
        CudaGraphManager(get_model_config(model[0]), pg_collection=managers[0].pg_collection)
    if any(graph is not None for graph in FullCudaGraphWrapper.cuda_graph.values()):
        torch.cuda.synchronize()
        FullCudaGraphWrapper.reset_cuda_graph(FullCudaGraphWrapper)  # what it resets is the class's
        _pool.clear()


def end() -> None:
    """Before the process group ends, on every rank: NCCL waits for ever to end what a graph may still repeat."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        for graph in _living(torch.cuda.CUDAGraph):  # of layers, of iterations, of the optimizer, of Transformer Engine
            graph.reset()


def _forget_uses() -> None:
    """Take Megatron's notes from tensors that live on, as the rotary angles that it caches.

    It counts on each how often a recording reads it, and asserts while capturing that each of these reads came.
    """
    for one in _living(torch.Tensor):
        if hasattr(one, "cg_buffer_metadata"):
            del one.cg_buffer_metadata


def _living(kind: type) -> list[Any]:
    """All objects of a class, by their types alone: asking some objects of others for theirs runs code."""
    return [one for one in gc.get_objects() if issubclass(type(one), kind)]


def _timed(what: str, captured: Callable[[], bool], work: Callable[[], Any]) -> Any:
    began, held = time.monotonic(), torch.cuda.memory_reserved()
    result = work()
    if captured():
        _say(what, time.monotonic() - began, torch.cuda.memory_reserved() - held)
    return result


def _say(what: str, seconds: float, more: float) -> None:
    """`more`: bytes that torch holds of the GPU beyond those before."""
    held = torch.cuda.memory_reserved() / 2**30
    say_once(f"CUDA graphs of {what} were captured in {seconds:.1f} s; {held:.2f} GiB are held, {more / 2**30:.2f} GiB more.")
