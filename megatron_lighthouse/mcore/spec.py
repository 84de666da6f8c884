"""`--spec megatron_lighthouse.mcore.spec lighthouse`: the name that command lines and checkpoints hold."""

from megatron_lighthouse.mcore.attention.layer_specs import lighthouse

__all__ = ["lighthouse"]
