"""Lighthouse Attention (arXiv 2605.06554) for Megatron-core: faster long-context pre-training."""

from megatron_lighthouse.lighthouse.attention import lighthouse_attention, lighthouse_select
from megatron_lighthouse.lighthouse.config import LighthouseConfig
from megatron_lighthouse.lighthouse.rotary import Rotary

__all__ = ["LighthouseConfig", "Rotary", "lighthouse_attention", "lighthouse_select"]
__version__ = "0.1.0"
