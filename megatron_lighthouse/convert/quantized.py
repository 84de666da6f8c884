"""Quantised weights as the bf16 that they stand for: FP8 with a scale a block (DeepSeek-V3), MXFP4 (gpt-oss)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from megatron_lighthouse.convert.family import Config
from megatron_lighthouse.convert.safetensors_files import Stored

FP8_SCALE, BLOCKS, SCALES = "_scale_inv", "_blocks", "_scales"
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of e2m1 by code (OCP Microscaling Formats 1.0, section 5.3.3)."""
E8M0_BIAS = 127
METHODS = ("fp8", "mxfp4")


class Source(Protocol):
    """Tensors by name, read one at a time."""

    stored: Mapping[str, Stored]

    def read(self, name: str, index: int | None = None) -> Tensor:
        """The tensor, or the part of it at `index` of its first axis."""


class Dequantized:
    """A source whose quantised tensors are bf16, and whose scales are not there.

    Raises:
        ValueError: another method than METHODS, a quantised tensor without its scales, or scales of another shape.
    """

    def __init__(self, source: Source, config: Config) -> None:
        given = config.get("quantization_config") or {}
        if given and (method := given.get("quant_method")) not in METHODS:
            raise ValueError(f"config.json's quant_method {method} is not read: {' and '.join(METHODS)} are.")
        self._source = source
        self._block: tuple[int, int] = tuple(given.get("weight_block_size") or (128, 128))
        self.quantized: list[str] = []
        """Names of what is not as it is in the files."""
        self.stored: dict[str, Stored] = {}
        for name, stored in source.stored.items():
            self._add(name, stored)

    def _add(self, name: str, stored: Stored) -> None:
        there = self._source.stored
        if name.removesuffix(FP8_SCALE) in there and name.endswith(FP8_SCALE):
            return
        if name.endswith(SCALES) and name.removesuffix(SCALES) + BLOCKS in there:
            return
        if name.endswith(BLOCKS):
            whole = name.removesuffix(BLOCKS)
            experts, rows, groups, packed = stored.shape
            self._check(whole + SCALES, (experts, rows, groups))
            name, stored = whole, Stored((experts, groups * packed * 2, rows), torch.bfloat16)
            self.quantized.append(name)
        elif stored.dtype == torch.float8_e4m3fn:
            blocks = tuple(-(-n // size) for n, size in zip(stored.shape, self._block, strict=True))
            self._check(name + FP8_SCALE, blocks)
            stored = Stored(stored.shape, torch.bfloat16)
            self.quantized.append(name)
        self.stored[name] = stored

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        found = self._source.stored.get(name)
        if found is None:
            raise ValueError(f"{name} is missing: what it scales cannot be read.")
        if found.shape != shape:
            raise ValueError(f"{name} has shape {[*found.shape]}, not {[*shape]}.")

    def read(self, name: str, index: int | None = None) -> Tensor:
        """As the source's, bf16 where it is quantised there."""
        if name not in self.quantized:
            return self._source.read(name, index)
        if name + BLOCKS in self._source.stored:
            return mxfp4(self._source.read(name + BLOCKS, index), self._source.read(name + SCALES, index))
        whole = fp8(self._source.read(name), self._source.read(name + FP8_SCALE), self._block)
        return whole if index is None else whole[index]


def fp8(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """[o, i] e4m3 and [o / block, i / block] scales -> [o, i] bf16: each element times its block's scale, in fp32."""
    for axis, size in enumerate(block):
        scale = scale.repeat_interleave(size, dim=axis).narrow(axis, 0, weight.shape[axis])
    return (weight.float() * scale.float()).bfloat16()


def mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """[…, o, i / 32, 16] pairs of codes, low nibble first, and [… o, i / 32] exponents -> [… i, o] bf16, exact."""
    table = torch.tensor(FP4, dtype=torch.bfloat16)
    pairs = torch.stack([table[(blocks & 15).int()], table[(blocks >> 4).int()]], dim=-1).flatten(-2)
    exponents = scales.to(torch.int32).unsqueeze(-1) - E8M0_BIAS
    return torch.ldexp(pairs, exponents).flatten(-2).transpose(-1, -2).contiguous()
