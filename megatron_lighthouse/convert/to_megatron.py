"""From a Hugging Face folder to one that a run loads: checkpoint, arguments, and what is no weight."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_lighthouse.bars import bar
from megatron_lighthouse.convert import files, torch_dist
from megatron_lighthouse.convert.arguments import model_words, namespace
from megatron_lighthouse.convert.hugging_face import HuggingFace
from megatron_lighthouse.convert.mapping import HEAD, Placed
from megatron_lighthouse.convert.torch_dist import EXTRA, RELEASE, TRACKER, Part, object_key

ARGUMENTS, RECORD = "model.args", "conversion.json"
CHECKPOINT_VERSION = 3.0
"""Of Megatron's: the order of rows in linear_qkv."""
MODULES = ("core_attention",)
"""Modules of a layer without a weight of their own that Transformer Engine keeps an object of, within self_attention."""


def convert(source: Path, target: Path, *, force: bool, leave_out: list[str], mtp: bool) -> list[str]:
    """Write `target`, and say what it holds and what was left out.

    Raises:
        ValueError: whatever stands against it, before anything is written.
    """
    model = HuggingFace(source, leave_out, mtp)
    words = model_words(model.family, model.fields, tied=model.tied, mtp=model.mtp)
    files.check_apart(source, target)
    if any(letter.isspace() for letter in str(target.resolve())):
        raise ValueError(f"{target.resolve()} has blanks, which {ARGUMENTS} cannot quote: name another folder.")
    parts = [part for placed in model.placed for part in _parts(model, placed)]
    _check_dtypes(parts)
    total = sum(part.bytes for part in parts)
    files.check_target(target, force, total, (TRACKER, RECORD))
    objects = dict.fromkeys(_objects(model.placed), torch.empty(0, dtype=torch.uint8))
    common = {"args": namespace(words), "checkpoint_version": CHECKPOINT_VERSION, "iteration": 0}
    tokenizer = target.resolve() / files.CARRIED
    with files.replacing(target) as folder, bar(total=total, unit="B", unit_scale=True) as progress:
        carried = files.carry(source, folder / files.CARRIED)
        (folder / ARGUMENTS).write_text(_argument_file(model, words, tokenizer, carried))
        (folder / RELEASE).mkdir()
        torch_dist.write(folder / RELEASE, parts, {object_key("common_state", []): common, **objects}, progress.update)
        (folder / RECORD).write_text(json.dumps(_record(model), indent=2) + "\n")
        (folder / TRACKER).write_text(RELEASE)
    return [
        f"{target}: {len(model.placed)} tensors, {total / 1e9:.2f} GB, of {model.family.architecture}",
        f"arguments of the model: {target / ARGUMENTS}",
        f"the output layer is {'the embedding' if model.tied else 'a tensor of its own'}",
        *([f"{len(model.source.quantized)} tensors were quantised, and are bf16 now"] if model.source.quantized else []),
        *(f"left out: {name}" for name in model.left_out),
    ]


def _check_dtypes(parts: list[Part]) -> None:
    """Layers and experts are one tensor in Megatron's checkpoint, and so of one dtype."""
    dtypes: dict[str, torch.dtype] = {}
    for part in parts:
        if (first := dtypes.setdefault(part.key, part.dtype)) != part.dtype:
            raise ValueError(f"{part.key} would be of {first} in one layer and of {part.dtype} in another: give all one dtype.")


def _parts(model: HuggingFace, placed: Placed) -> Iterator[Part]:
    """Once for each name under which a layer spec looks for it."""
    axes = placed.axes(placed.stacked)
    shape = (*[1] * len(axes), *placed.shape)
    size = (*[count for _, count in axes], *placed.shape)
    offsets = (*[number for number, _ in axes], *[0] * len(placed.shape))
    for name in placed.names:
        key = placed.key(name, placed.stacked)
        yield Part(key, size, offsets, shape, model.dtype(placed), lambda: model.read(placed))


def _objects(placed: list[Placed]) -> Iterator[str]:
    """Keys of the objects that modules keep: empty, but Megatron refuses a checkpoint without them."""
    for one in placed:
        for name in one.names:
            module, what = one.key(name, one.stacked).rsplit(".", 1)
            if what == "weight" and module.startswith(("decoder.", "mtp.")):
                yield object_key(module + EXTRA, one.axes(one.stacked))
            if name.endswith("self_attention.linear_proj.weight"):
                for other in MODULES:
                    yield object_key(module.removesuffix("linear_proj") + other + EXTRA, one.axes(one.stacked))


def _argument_file(model: HuggingFace, words: list[str], tokenizer: Path, carried: list[str]) -> str:
    """As the files of launch/recipes: words of a command line, a flag and its values a line."""
    lines = [f"# {model.family.architecture}, converted. The file says what the model is; how it is trained is yours.", ""]
    if any(name.startswith("tokenizer") for name in carried):
        words = [*words, "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer)]
    for word in words:
        if word.startswith("--"):
            lines.append(word)
        else:
            lines[-1] += " " + word
    return "\n".join(lines) + "\n"


def _record(model: HuggingFace) -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "architecture": model.family.architecture,
        "tied": model.tied,
        "output_layer_in_files": HEAD in model.source.stored,
        "mtp_layers": model.mtp,
        "quantized": len(model.source.quantized),
        "left_out": model.left_out,
    }
