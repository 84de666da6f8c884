"""Parallax as Triton kernels: what `megatron_lighthouse.parallax.blocks.Plain` computes.

Online softmax with covariance: no running sum grows with the mean of u. No atomics; every element is written once and every sum
has one order, so results are bit-identical from run to run. Block sizes are a table by head dimension and dtype.
"""

from __future__ import annotations

from megatron_lighthouse.kernels.parallax.backward import backward
from megatron_lighthouse.kernels.parallax.forward import forward

__all__ = ["backward", "forward"]
