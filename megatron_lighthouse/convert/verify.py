"""Whether two folders hold the same model, to the bit: of Hugging Face, or of Megatron's seen as Hugging Face's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_lighthouse.bars import bar
from megatron_lighthouse.convert.arguments import changed_fields
from megatron_lighthouse.convert.hugging_face import HuggingFace, same_bits
from megatron_lighthouse.convert.safetensors_files import Tensors
from megatron_lighthouse.convert.to_hugging_face import Megatron
from megatron_lighthouse.convert.torch_dist import TRACKER


def differences(one: Path, other: Path, *, like: Path | None, leave_out: list[str], mtp: bool) -> list[str]:
    """Lines that say in which tensors two folders differ, and in which fields of config.json (these begin with its name)."""
    (first, config), (second, other_config) = (_opened(folder, like, leave_out, mtp) for folder in (one, other))
    lines = [f"{name}: only in {one}" for name in first if name not in second]
    lines += [f"{name}: only in {other}" for name in second if name not in first]
    for name in bar([name for name in first if name in second], unit="tensor"):
        mine, its = first[name].stored, second[name].stored
        if mine != its:
            lines.append(f"{name}: {[*mine.shape]} {mine.dtype} and {[*its.shape]} {its.dtype}")
        elif not same_bits(first[name].read(), second[name].read()):
            lines.append(f"{name}: other numbers")
    return lines + [f"config.json {line}" for line in changed_fields(config, other_config)]


def _opened(folder: Path, like: Path | None, leave_out: list[str], mtp: bool) -> tuple[dict[str, Tensors], Mapping[str, Any]]:
    if (folder / TRACKER).is_file():
        megatron = Megatron(folder, like=like, mtp=mtp)
        return {tensor.name: tensor for tensor in megatron.tensors()}, megatron.config
    model = HuggingFace(folder, leave_out, mtp)
    return model.tensors(), model.config
