"""Sinks of a tensor-parallel model: each rank's are of its own heads, which Megatron 0.19 does not say of them (7452).

Without it the norm of the gradient counts those of the first rank alone, and so clips otherwise than one process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.spec_utils import build_module
from torch.nn import Parameter

from megatron_lighthouse.mcore.attention.builder import Builder


def with_counted_sinks(core_attention: Any) -> Any:
    """The same module, whose sinks, where it learns them, are counted on all ranks."""
    sinks = getattr(core_attention, "softmax_offset", None)
    if isinstance(sinks, Parameter) and not hasattr(sinks, "tensor_model_parallel"):
        set_tensor_model_parallel_attributes(sinks, True, 0, 1)
    return core_attention


@dataclass(frozen=True)
class CountedSinks(Builder):
    """Builds the core attention `base` of a layer spec, a class or a ModuleSpec, and has its sinks counted."""

    base: Any

    def __call__(self, **kwargs: Any) -> Any:
        return with_counted_sinks(build_module(self.base, **kwargs))
