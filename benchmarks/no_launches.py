"""Python's part of the host's time, without a GPU: kernels are compiled and found as ever, and the launch itself is nothing.

The inner attention is nothing too, but for its node in the graph of gradients: what is left of a layer is its own Python, and
what it asks of torch.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class Launcher:
    """Stands for Triton's compiled launcher, which a compiled kernel is run by."""

    def __init__(self, source: object, metadata: object) -> None:
        pass

    def __call__(self, *args: object) -> None:
        pass


class Nothing(torch.autograd.Function):
    """The inner attention: rows of the right shapes, and whatever they hold."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        return query.view_as(query)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        _, key, value = ctx.saved_tensors
        return grad, key, value


def install() -> None:
    """Have kernels run on tensors of the CPU, as on an H200, and do nothing. SystemExit where there is a GPU."""
    if torch.cuda.is_available():
        raise SystemExit("--no-launches is for machines without a GPU: set CUDA_VISIBLE_DEVICES=")
    import triton
    from triton.backends.compiler import GPUTarget

    utils = SimpleNamespace(
        load_binary=lambda *_: (object(), 1, 64, 0, 1024),
        get_device_properties=lambda _: {"max_shared_mem": 232448},
        unload_module=lambda _: None,
    )
    driver = SimpleNamespace(
        utils=utils,
        launcher_cls=Launcher,
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    triton.runtime.driver.set_active(driver)
    from megatron_lighthouse.kernels import lighthouse
    from megatron_lighthouse.lighthouse.layer import build
    from megatron_lighthouse.softmax import backends

    layer: Any = sys.modules[build.__module__]
    layer.steps_for = lambda *_: lighthouse
    backends.BACKENDS["sdpa"] = backends.Backend("nothing", lambda rows: None, lambda q, k, v, scale: Nothing.apply(q, k, v))


def as_if_initialized() -> None:
    """Have torch say that CUDA is up, with nothing to wait for and ranges that go nowhere: after the layers are built."""
    cuda: Any = torch.cuda
    cuda.is_initialized, cuda.synchronize = lambda: True, lambda *_: None
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *_: 0
