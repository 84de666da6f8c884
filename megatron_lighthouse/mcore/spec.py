"""The names that command lines and checkpoints hold (`--spec megatron_lighthouse.mcore.spec lighthouse`), and scripts."""

from megatron_lighthouse.mcore.attention.layer_specs import lighthouse, with_lighthouse

__all__ = ["lighthouse", "with_lighthouse"]
