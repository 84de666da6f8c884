"""The name that checkpoints of hybrid models hold (`--spec megatron_lighthouse.mcore.hybrid_spec lighthouse`)."""

from megatron_lighthouse.mcore.attention.hybrid_specs import lighthouse

__all__ = ["lighthouse"]
