"""The scales of FP8 attention in `torch_dist` checkpoints, from which Megatron 0.19 leaves them out.

Transformer Engine keeps them, with the greatest magnitudes that they are made of, as a module's extra state. Megatron stores
that of linear layers, and none of its `TEDotProductAttention`: a resumed run would begin with scales of 1.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint

from megatron_lighthouse.mcore.command_line import fp8

NAME = "_extra_state"


class ScalesMixin:
    """Over a core-attention class of Transformer Engine's."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Megatron's, and the extra state as of linear layers: the ranks that share a layer have the same."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        if prefix + NAME in state:
            return state
        groups = {"tp_group": self._tp_group, "dp_cp_group": metadata["dp_cp_group"]}  # type: ignore[attr-defined]
        own = {NAME: self.get_extra_state()}  # type: ignore[attr-defined]
        return state | make_sharded_tensors_for_checkpoint(own, prefix, None, sharded_offsets, **groups)


@cache
def class_with_scales(base: type) -> type:
    """The core-attention class `base`, whose scales are stored; itself, if they are."""
    if issubclass(base, ScalesMixin):
        return base
    return type(base.__name__ + "WithScales", (ScalesMixin, base), {"__module__": base.__module__})


def with_scales(core_attention: Any, config: TransformerConfig) -> Any:
    """`core_attention` of a layer spec; in FP8, a class of it whose scales are stored."""
    if not fp8.asked(config):
        return core_attention
    if isinstance(core_attention, ModuleSpec):
        module = class_with_scales(core_attention.module)
        return ModuleSpec(module, params=core_attention.params, submodules=core_attention.submodules)
    return class_with_scales(core_attention)
