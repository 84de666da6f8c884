"""Which implementation of Wall's diagonal runs where: the kernels, or plain PyTorch; and what attends to earlier pieces."""

from __future__ import annotations

import importlib
from typing import cast

import torch
from torch import Tensor

from megatron_lighthouse.lighthouse.implementations import missing
from megatron_lighthouse.notice import say_once
from megatron_lighthouse.softmax.blocks import block_for
from megatron_lighthouse.wall import decay, reference
from megatron_lighthouse.wall.decay import Decays
from megatron_lighthouse.wall.diagonal import Diagonal
from megatron_lighthouse.wall.earlier import Earlier, Plain, Stock

SEEN = (torch.bfloat16, 128)
"""On an H200 the kernels of today were right with these. A run at 64 or 80 channels ended in an illegal memory access."""


def makers_for(name: str, device: torch.device, dtype: torch.dtype, dims: tuple[int, int]) -> tuple[Diagonal, Decays]:
    """What `name` of --wall-kernels stands for: what makes the diagonal, and what decays rows to anchors.

    Args:
        dims: the head dimensions K and V.

    Raises:
        ValueError: 'triton' where the kernels cannot run.
    """
    plain = cast(Diagonal, reference), cast(Decays, decay)
    if name == "reference" or (name == "auto" and device.type != "cuda"):
        return plain
    problem = missing(device.type, dtype, max(dims))
    if problem is None and name == "auto" and (dtype, *dims) != (*SEEN, SEEN[1]):
        problem = (
            f"they have run rightly on a GPU at {SEEN[1]} channels in bfloat16, not yet at {max(dims)} and {min(dims)} in "
            f"{str(dtype).removeprefix('torch.')}; --wall-kernels triton takes them all the same"
        )
    if problem is None:
        kernels = importlib.import_module("megatron_lighthouse.kernels.wall")
        return cast(Diagonal, kernels), cast(Decays, kernels)
    if name == "triton":
        raise ValueError(f"--wall-kernels triton cannot run: {problem}. Use auto or reference.")
    say_once(f"wall: the diagonal runs in plain PyTorch, many times slower than the kernels: {problem}.")
    return plain


def earlier_for(query: Tensor, value: Tensor, gate_heads: int, scale: float, biased: bool, masked: bool) -> Earlier:
    """What attends to pieces before a query's own: on a GPU a stock kernel, where it can.

    Args:
        gate_heads: heads of the gates, and so of decayed keys.
        biased: whether there are scalar gates.
        masked: whether there is a window.
    """
    if query.device.type != "cuda":
        return Plain(scale)
    alike = query.shape[-1] == value.shape[-1]
    if alike and not biased and not masked:
        return Stock(block_for("auto", query, query[:, :, :gate_heads], scale))
    what = "scalar gates" if biased else "a window" if masked else "values narrower or wider than keys"
    say_once(f"wall: attention to earlier pieces runs in plain PyTorch, slowly: stock kernels know no {what}.")
    return Plain(scale)
