"""Attention in Megatron's layers: core attention, layer specs, norms, outputs."""
