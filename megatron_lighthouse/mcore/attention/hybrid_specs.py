"""The layers of Megatron's HybridModel, which `--hybrid-layer-pattern` names one by one.

With Transformer Engine Megatron's own stack; without it, one of the modules of its local GPT layers, whose keys in checkpoints
it takes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer import ModuleSpec, TransformerConfig, TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.transformer_layer import MoETransformerLayer

from megatron_lighthouse.mcore.attention.copied import copied
from megatron_lighthouse.mcore.attention.norm import take_torch_norms

OF_MLP = ("pre_mlp_layernorm", "mlp", "mlp_bda")
OF_ATTENTION = ("input_layernorm", "self_attention", "self_attn_bda")


def hybrid_stack(config: TransformerConfig) -> ModuleSpec:
    """The stack's spec, to be changed freely.

    Layers that are not made of local modules (Mamba, gated delta nets, multi-token prediction) are Transformer Engine's alone.
    """
    if config.transformer_impl != "local":
        return copied(hybrid_stack_spec)
    common = {"normalization": config.normalization, "qk_layernorm": config.qk_layernorm}
    dense, latent, experts = (
        _with_norms(get_gpt_layer_local_submodules(**common, **own), config)
        for own in (
            {"qk_l2_norm": config.qk_l2_norm},
            {"multi_latent_attention": True},
            {"num_experts": config.num_moe_experts or 1, "moe_grouped_gemm": config.moe_grouped_gemm},
        )
    )
    submodules = HybridStackSubmodules(
        attention_layer=_part(TransformerLayer, dense, OF_ATTENTION),
        mla_layer=_part(TransformerLayer, latent, OF_ATTENTION),
        mlp_layer=_part(MLPLayer, dense, OF_MLP),
        moe_layer=_part(MoETransformerLayer, experts, OF_MLP),
    )
    return ModuleSpec(module=HybridStack, submodules=submodules)


class LighthouseStack(HybridStack):  # type: ignore[misc]
    """For `--spec megatron_lighthouse.mcore.hybrid_spec lighthouse`: the stack that Megatron's arguments name, made Lighthouse.

    Raises:
        ValueError: settings, a model or data that Lighthouse refuses.
    """

    def __init__(self, config: TransformerConfig, submodules: HybridStackSubmodules, **named: Any) -> None:
        from megatron.training import get_args

        from megatron_lighthouse.mcore.attention.layer_specs import hybrid_spec, settled
        from megatron_lighthouse.mcore.command_line.arguments import model_config
        from megatron_lighthouse.mcore.command_line.hybrid import upstream_problem
        from megatron_lighthouse.mcore.loop import hooks

        if problem := upstream_problem(get_args()):
            raise ValueError(problem)
        model_cfg = model_config(get_args())
        config.hybrid_layer_pattern = model_cfg.transformer.hybrid_layer_pattern
        hooks.stack_locally()
        spec = hybrid_spec(model_cfg, settings=settled(get_args(), config))
        super().__init__(config, spec.submodules, **named)


lighthouse = ModuleSpec(module=LighthouseStack, submodules=HybridStackSubmodules())


def final_norm(inner: Callable[..., Any], config: TransformerConfig, **named: Any) -> Any:
    """In place of `TENorm` in Megatron's stack, which takes it by name: that of the local layers, where these are local."""
    if config.transformer_impl != "local":
        return inner(config, **named)
    local = get_gpt_layer_local_submodules(normalization=config.normalization)
    return _with_norms(local, config).input_layernorm(config=config, **named)


def _part(module: type, submodules: TransformerLayerSubmodules, names: tuple[str, ...]) -> ModuleSpec:
    """A layer of these submodules of a GPT layer, with its keys of checkpoints."""
    kept = {name: copy.deepcopy(getattr(submodules, name)) for name in names}
    keys = {own: key for own, key in submodules.sharded_state_dict_keys_map.items() if own.rstrip(".") in names}
    return ModuleSpec(module=module, submodules=TransformerLayerSubmodules(**kept, sharded_state_dict_keys_map=keys))


def _with_norms(submodules: TransformerLayerSubmodules, config: TransformerConfig) -> TransformerLayerSubmodules:
    """Where Megatron would take torch's norm, which refuses sequence parallelism, take one that works."""
    if config.sequence_parallel:
        take_torch_norms(submodules)
    return submodules
