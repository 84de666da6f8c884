"""`python benchmarks/launches.py`: what Lighthouse around Wall launches, forward and backward, counted on a CPU.

Torch's operations on the device 'meta', and kernels that are noted and not run. On an H200 `wall.py --parts` counts the same.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from one_layer import AROUND_FROM, Case, of_length
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from wall import AROUND, inputs_of

from megatron_lighthouse import lighthouse_attention
from megatron_lighthouse.context_parallel import merge
from megatron_lighthouse.kernels import launch
from megatron_lighthouse.softmax.blocks import Cudnn
from megatron_lighthouse.wall import gathered
from megatron_lighthouse.wall.config import WallConfig
from megatron_lighthouse.wall.cut import Step
from megatron_lighthouse.wall.earlier import Stock

FREE = ("aten::empty", "aten::new_empty", "aten::detach", "aten::promote_types")
"""Beginnings of operations that launch nothing, besides views."""
SEVERAL = {"aten::_scaled_dot_product_cudnn_attention_backward": 5}
"""cuDNN's on an H200: two fills, the sums of gradients times outputs, the pairs, and the queries' gradients in 16 bits."""


def launches(call: Callable[[], object]) -> Counter[str]:
    """By operation or kernel, of a call on tensors of the device 'meta': of the second, when all is built."""
    found: Counter[str] = Counter()

    def noted(prepared: launch.Prepared, *_: Tensor) -> None:
        kernel = prepared.kernel.fn
        found[f"{kernel.__module__.removeprefix('megatron_lighthouse.kernels.')}.{kernel.__name__}"] += 1

    with (
        mock.patch.dict(os.environ, TRITON_INTERPRET="1"),  # or kernels are refused without a GPU
        mock.patch.object(launch.Prepared, "__call__", noted),
        mock.patch.object(merge, "triton_takes", return_value=True),
        mock.patch.object(gathered, "triton_takes", return_value=True),
    ):
        call()
        found.clear()
        with _Noted(found):
            call()
    return found


class _Noted(TorchDispatchMode):
    """Torch's operations."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation.name()
        if not operation.is_view and not name.startswith(FREE):
            self.found[name] += SEVERAL.get(name, 1)
        return operation(*args, **(kwargs or {}))


def around_wall(case: Case) -> Counter[str]:
    """One forward and backward pass, as a GPU takes it."""
    query, key, value, gate = inputs = inputs_of(case, device="meta")
    config, around, grad = AROUND.replace(steps="kernels"), WallConfig(kernels="triton"), torch.empty_like(query)

    def both() -> object:
        out = lighthouse_attention(query, key, value, config, streams=[gate], around=around)
        return torch.autograd.grad(out, inputs, grad)

    with mock.patch("megatron_lighthouse.wall.layer.earlier_for", lambda *given: Stock(Cudnn(given[3]), given[3])):
        return launches(both)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=AROUND_FROM, help="default: %(default)s")
    parser.add_argument(
        "--piece",
        type=int,
        default=Step.TOKENS,
        help="rows of a piece that travels; along the diagonal a quarter; default: %(default)s",
    )
    options = parser.parse_args()
    Step.TOKENS = options.piece
    found = around_wall(of_length(options.tokens))
    print(*(f"{count:4} {name}" for name, count in found.most_common()), f"{found.total():4} in all", sep="\n")


if __name__ == "__main__":
    main()
