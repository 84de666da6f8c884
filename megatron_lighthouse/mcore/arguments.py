"""The name that checkouts of Megatron-LM hold which `patches/patch.py` has changed."""

from megatron_lighthouse.mcore.command_line.arguments import use_attention, with_lighthouse_arguments

__all__ = ["use_attention", "with_lighthouse_arguments"]
