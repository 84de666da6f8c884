"""Blocks by FlashAttention 4 and 3: see `softmax.blocks`. `choose_for_blocks`, which comes first, finds their functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from megatron_lighthouse.context_parallel.parts import Mask, Part, Tensors
from megatron_lighthouse.softmax.backends import BACKENDS, FAMILIES, deterministic, found, import_problem
from megatron_lighthouse.softmax.base import Softmax, batch_first
from megatron_lighthouse.softmax.rows import SHARDS, SINKS, WINDOWS, RowKind


class Flash(Softmax):
    """What FlashAttention 4 and 3 share: rows [B, n, heads, D], and a log-sum-exp as `Part` has it.

    Their backward, given output and log-sum-exp over all far rows, gives the gradients of some of them (FlashAttention-2's
    algorithm 2). It sums gradient times output itself.
    """

    UNBOUNDED: ClassVar[int | None]
    """A side of their window that hides nothing."""

    def forward(self, near: Tensors, far: Tensors, mask: Mask) -> Part:
        rows = batch_first(*near, *far)
        out, lse = self._attend(*rows, softmax_scale=self.scale, causal=mask.causal, window_size=self._window)
        return Part((out.transpose(0, 1),), lse)

    def backward(self, grad: Tensor, near: Tensors, far: Tensors, part: Part, mask: Mask) -> tuple[Tensors, Tensors]:
        given = (*batch_first(grad, *near, *far, *part.averages), part.lse.contiguous())
        left, right = self._window
        how = {"softmax_scale": self.scale, "window_size_left": left, "window_size_right": right}
        of_query, *others = batch_first(*self._gradients(*given, mask.causal, deterministic=deterministic(), **how))
        return (of_query,), tuple(others)

    @property
    def _window(self) -> tuple[int | None, int | None]:
        """Rows before and after its own, which is counted from the last near and the last far row."""
        return (self.UNBOUNDED, self.UNBOUNDED) if self.window is None else (self.window, 0)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _gradients(self, *given: Any, **how: Any) -> Sequence[Tensor]:
        """Of q, k and v, by the gradient, these, output, log-sum-exp, and whether rows are hidden."""
        raise NotImplementedError


class Flash4(Flash):
    """FlashAttention 4; repeats to the bit where torch is asked for it."""

    UNBOUNDED = None

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
        out, lse = found("flash_attn.cute", "flash_attn_func")(q, k, v, return_lse=True, **how)
        return out, lse

    def _gradients(self, *given: Any, **how: Any) -> Sequence[Tensor]:
        g, q, k, v, o, lse, causal = given
        grads: tuple[Tensor, ...] = found("flash_attn.cute.interface", "_flash_attn_bwd")(
            q, k, v, o, g, lse, causal=causal, **how
        )
        return grads[:3]


class Flash3(Flash):
    """FlashAttention 3; up to 192 channels it repeats to the bit where torch is asked for it."""

    UNBOUNDED = -1

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
        out, lse = found("flash_attn_interface", "flash_attn_func")(q, k, v, return_attn_probs=True, **how)
        return out, lse

    def _gradients(self, *given: Any, **how: Any) -> Sequence[Tensor]:
        *tensors, causal = given
        dq, dk, dv = (x.new_empty(x.shape) for x in tensors[1:4])  # which it writes
        backward = found("flash_attn_interface", "_flash_attn_backward")
        backward(*tensors, dq=dq, dk=dk, dv=dv, is_causal=causal, **how)
        return dq, dk, dv


def _problem(name: str, package: str, functions: dict[tuple[str, str], Sequence[str]]) -> Callable[[RowKind], str | None]:
    """Why FlashAttention cannot take rows: as over whole sequences, or for want of a function with its options."""

    def problem(rows: RowKind) -> str | None:
        missing = (import_problem(package, *function, options) for function, options in functions.items())
        return BACKENDS[name].problem(rows) or next(filter(None, missing), None)

    return problem


_BACKWARD = ("softmax_scale", "window_size_left", "window_size_right", "deterministic")
_FLASH4: dict[tuple[str, str], Sequence[str]] = {
    ("flash_attn.cute", "flash_attn_func"): ("softmax_scale", "causal", "window_size", "return_lse"),
    ("flash_attn.cute.interface", "_flash_attn_bwd"): ("causal", *_BACKWARD),
}
_FLASH3: dict[tuple[str, str], Sequence[str]] = {
    ("flash_attn_interface", "flash_attn_func"): ("softmax_scale", "causal", "window_size", "return_attn_probs"),
    ("flash_attn_interface", "_flash_attn_backward"): ("is_causal", "dq", "dk", "dv", *_BACKWARD),
}
FAMILIES[SHARDS] = FAMILIES[SINKS] = FAMILIES[WINDOWS] = {
    **BACKENDS,
    "fa4": replace(BACKENDS["fa4"], problem=_problem("fa4", "flash-attn-4", _FLASH4)),
    "fa3": replace(BACKENDS["fa3"], problem=_problem("fa3", "hopper/ of the flash-attention repository", _FLASH3)),
    "sdpa": replace(BACKENDS["sdpa"], title="plain PyTorch"),
}
