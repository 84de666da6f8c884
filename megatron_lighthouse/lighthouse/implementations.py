"""Which implementation of the steps runs where: the kernels, or plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from megatron_lighthouse.gpu import kernels_problem
from megatron_lighthouse.lighthouse import reference
from megatron_lighthouse.lighthouse.packed import reference as packed_reference
from megatron_lighthouse.lighthouse.packed.steps import PackedSteps
from megatron_lighthouse.lighthouse.steps import Steps
from megatron_lighthouse.notice import say_once

MOST_POOLING = 16


def steps_for(name: str, query: Tensor, pooling: int = 2) -> Steps:
    """The implementation of the steps that `name` stands for, on `query`'s device and dtype.

    Args:
        name: 'kernels', 'reference', or 'auto': the kernels on a GPU where they can run, else plain PyTorch, said once.
        pooling: p. Above 16 the kernels run, slowly: said once.

    Raises:
        ValueError: 'kernels' where they cannot run.
    """
    if name == "reference" or (name == "auto" and query.device.type != "cuda"):
        return reference
    problem = kernels_problem(query.device.type, query.dtype, query.shape[-1])
    if problem is None:
        from megatron_lighthouse.kernels import lighthouse as kernels

        if pooling > MOST_POOLING:
            say_once(
                f"lighthouse: the kernels are made for a pooling of 2 to {MOST_POOLING}: at {pooling} they run out of "
                "registers, and are slow."
            )
        return kernels
    if name == "kernels":
        raise ValueError(f"config.steps kernels cannot run: {problem}. Use auto or reference.")
    say_once(f"lighthouse: the steps run in plain PyTorch, many times slower than the kernels: {problem}.")
    return reference


def packed_steps_for(name: str, query: Tensor, pooling: int) -> PackedSteps:
    """As `steps_for`, over packed documents."""
    if steps_for(name, query, pooling) is reference:
        return packed_reference
    from megatron_lighthouse.kernels.lighthouse import packed as packed_kernels

    return packed_kernels
