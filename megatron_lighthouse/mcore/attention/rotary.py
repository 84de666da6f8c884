"""By what a Megatron model rotates queries and keys, read off the module that it rotates them by."""

from __future__ import annotations

from typing import Any

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding

from megatron_lighthouse.lighthouse.rotary import Rotary
from megatron_lighthouse.mcore.command_line.layers import hybrid_pattern
from megatron_lighthouse.mcore.command_line.rope import rope_problems

OF_LATENT_YARN = "original_max_position_embeddings beta_fast beta_slow mscale mscale_all_dim".split()
OF_YARN = """
    original_max_position_embeddings beta_fast beta_slow mscale mscale_all_dim correction_range_round_to_int
""".split()


def rotary_of(model_cfg: Any) -> Rotary | None:
    """The rotation that a model's layers apply, but for those of `no_rope_freq`; None where its positions are not rotary.

    Args:
        model_cfg: Megatron's GPTModelConfig or HybridModelConfig, of which the model makes the module that this makes too.

    Raises:
        ValueError: a model whose rotation is not one angle a token.
    """
    if problems := [*rope_problems(model_cfg.position_embedding_type)]:
        raise ValueError("\n".join(problems))
    config = model_cfg.transformer
    latent = config.multi_latent_attention  # rotates by itself, whatever the model's positions are
    if not latent and model_cfg.position_embedding_type not in ("rope", "yarn"):
        return None
    module = _of_latent(config) if latent else _module(model_cfg)
    for name in ("inv_freq", "inv_freq_extra", "inv_freq_inter"):  # what it keeps is fp32; what is computed of it need not be
        if hasattr(module, name):
            setattr(module, name, getattr(module, name).double())
    angles = module.get_emb(2)
    angles = (angles[0] if isinstance(angles, tuple) else angles)[1].flatten()  # yarn's come with a factor of their length
    interleaved = bool(config.rotary_interleaved)
    first = config.qk_head_dim if latent else 0
    return Rotary(angles[::2] if interleaved else angles[: len(angles) // 2], interleaved, first)


def _module(model_cfg: Any) -> Any:
    """As GPTModel of Megatron-core 0.19.2 makes it."""
    config = model_cfg.transformer
    how = {
        "kv_channels": config.kv_channels,
        "rotary_percent": model_cfg.rotary_percent,
        "rotary_interleaved": config.rotary_interleaved,
        "seq_len_interpolation_factor": model_cfg.seq_len_interpolation_factor,
        "rotary_base": model_cfg.rotary_base,
        "use_cpu_initialization": config.use_cpu_initialization,
    }
    if model_cfg.position_embedding_type == "rope":
        if hybrid_pattern(config):
            return RotaryEmbedding(**how)
        scaling = {"rope_scaling": model_cfg.rope_scaling, "rope_scaling_factor": model_cfg.rope_scaling_factor}
        return RotaryEmbedding(**how, **scaling)
    yarn = {name: getattr(config, f"yarn_{name}") for name in OF_YARN}
    return YarnRotaryEmbedding(**how, **yarn, scaling_factor=config.yarn_rotary_scaling_factor)


def _of_latent(config: Any) -> Any:
    """As `MultiLatentAttention` makes it: of the last channels of a query and key, whose halves it pairs."""
    if config.rope_type == "rope":
        how = {"rotary_percent": config.rotary_percent, "rotary_base": config.rotary_base}
        return RotaryEmbedding(config.qk_pos_emb_head_dim, **how, use_cpu_initialization=config.use_cpu_initialization)
    yarn = {name: getattr(config, name) for name in OF_LATENT_YARN}
    yarn |= {"rotary_base": config.rotary_base, "scaling_factor": config.rotary_scaling_factor}
    return YarnRotaryEmbedding(config.qk_pos_emb_head_dim, **yarn, use_cpu_initialization=config.use_cpu_initialization)
