"""Wall as Triton kernels: what `megatron_lighthouse.wall.diagonal` and `megatron_lighthouse.wall.decay` describe.

Gates are summed outward from an anchor, tile by tile: no sum runs over the sequence, and none is subtracted from another. No
atomics; every sum has one order, so results are bit-identical from run to run. Tiles are a table by head dimension and dtype.
"""

from __future__ import annotations

from megatron_lighthouse.kernels.wall.backward import backward
from megatron_lighthouse.kernels.wall.crossing import cross, cross_backward
from megatron_lighthouse.kernels.wall.decays import decay, decay_backward, tile_sums
from megatron_lighthouse.kernels.wall.forward import forward
from megatron_lighthouse.kernels.wall.halving import halves
from megatron_lighthouse.kernels.wall.halving_backward import halves_backward
from megatron_lighthouse.kernels.wall.suffix import suffix_sums

__all__ = [
    "backward",
    "cross",
    "cross_backward",
    "decay",
    "decay_backward",
    "forward",
    "halves",
    "halves_backward",
    "suffix_sums",
    "tile_sums",
]
