"""What does not go with multi-latent attention: Megatron's own refusals, said before, and what it does not read.

Which options of positions it reads stands in `positions`. Imports no Megatron.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

from megatron_lighthouse.mcore.command_line.layers import is_latent

ENGINE = "--transformer-impl transformer_engine"


def problems(args: Namespace) -> Iterator[str]:
    """Options that multi-latent attention does not do, or that nothing else does.

    Args:
        args: Megatron's, validated or not.
    """
    fused = getattr(args, "mla_down_proj_fusion", False)
    if not is_latent(args):
        if fused:
            yield "--mla-down-proj-fusion is of --multi-latent-attention: leave it out, or add that."
        return
    if every := getattr(args, "no_rope_freq", None):
        yield f"--no-rope-freq {every} is not read with multi-latent attention, which rotates in all layers: leave it out."
    if getattr(args, "qk_l2_norm", False):
        yield "--qk-l2-norm does not go with multi-latent attention: use --qk-layernorm, which norms latents, or leave it out."
    if getattr(args, "qk_layernorm", False) and args.transformer_impl == "local" and args.q_lora_rank is None:
        yield (
            "--qk-layernorm norms the latents of queries too, which --transformer-impl local has with --q-lora-rank alone: "
            f"give that, leave it out, or use {ENGINE}."
        )
    if getattr(args, "attention_output_gate", False):
        yield "--attention-output-gate does not go with multi-latent attention: leave it out."
    if getattr(args, "cache_mla_latents", False):
        yield "--cache-mla-latents is of inference, and its layers do not train: leave it out."
    if args.position_embedding_type == "yarn":
        yield (
            "--position-embedding-type yarn does not go with multi-latent attention, which rotates by itself: use "
            "--position-embedding-type rope, and --rope-type yarn (its default)."
        )
    rotated = (args.position_embedding_type, getattr(args, "rope_type", None)) == ("rope", "rope")
    if rotated and getattr(args, "apply_rope_fusion", False):  # which Megatron turns off for other positions
        yield "--rope-type rope of multi-latent attention goes without RoPE fusion (Megatron's default): add --no-rope-fusion."
    if fused and args.transformer_impl == "local":
        yield f"--mla-down-proj-fusion is Transformer Engine's, and --transformer-impl is local: leave it out, or use {ENGINE}."
    elif fused and args.q_lora_rank is None:
        yield "--mla-down-proj-fusion fuses what --q-lora-rank makes, which is not given: leave it out, or give that."
