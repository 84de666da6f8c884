"""Every tensor of one model: its name and place in Megatron's checkpoint, and the names in Hugging Face's files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from megatron_lighthouse.convert.family import Config, Family, Weight
from megatron_lighthouse.convert.forms import ONE, Form

FINAL_NORM, HEAD = "model.norm.weight", "lm_head.weight"
MEGATRON_EMBEDDING, MEGATRON_HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
VOCABULARY = (MEGATRON_EMBEDDING, MEGATRON_HEAD)
"""The tensors that Megatron pads by rows."""


@dataclass(frozen=True)
class Placed:
    """One tensor of one layer (and expert), or of the model."""

    names: tuple[str, ...]
    """Megatron's, without the part that says which layer it is; all of them are written."""
    parts: Mapping[str, tuple[int, ...]]
    """Whole names of Hugging Face's tensors, and their shapes, of this expert alone."""
    form: Form
    sizes: Mapping[str, int]
    stack: str = ""
    """What stands before a layer's number in Megatron's names: `decoder.layers.`; empty for tensors of the model."""
    layer: tuple[int, int] = (0, 1)
    """Its number, and of how many."""
    expert: tuple[int, int] | None = None
    """The same of experts."""
    by_first_axis: bool = False
    """Whether Hugging Face's tensors hold all experts, along their first axis."""
    stacked: bool = field(default=True)
    """Whether all layers are one tensor in a checkpoint that is written."""

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of Megatron's tensor, without the axes of layers and experts."""
        empty = [torch.empty(shape, device="meta") for shape in self.parts.values()]
        return tuple(self.form.join(empty, self.sizes).shape)

    def key(self, name: str, stacked: bool) -> str:
        """Megatron's."""
        return self.stack + ("" if stacked or not self.stack else f"{self.layer[0]}.") + name

    def axes(self, stacked: bool) -> list[tuple[int, int]]:
        """Number and count along the axes before the tensor's own."""
        layer = [self.layer] if self.stack and stacked else []
        return layer + ([self.expert] if self.expert else [])

    def candidates(self) -> Iterator[tuple[str, list[tuple[int, int]]]]:
        """Keys and axes under which a checkpoint may hold it: the specs, and layers of one or of several kinds, differ."""
        for stacked in dict.fromkeys([self.stacked, not self.stacked]):
            for name in self.names:
                yield self.key(name, stacked), self.axes(stacked)

    def split(self, tensor: Tensor) -> list[Tensor]:
        return self.form.split(tensor, [shape[0] for shape in self.parts.values()], self.sizes)


def all_placed(family: Family, config: Config, *, tied: bool, mtp: int = 0) -> list[Placed]:
    """In the order of the model.

    Args:
        tied: whether the output layer is the embedding.
        mtp: layers that predict further tokens, which follow the model's in Hugging Face's numbers.
    """
    sizes = family.sizes(config)
    vocab = {"vocab": sizes["vocab"], "hidden": sizes["hidden"]}
    layers, routed = config["num_hidden_layers"], family.has_experts(config)
    homogeneous, attention = one_kind(family, routed), [*family.attention, *family.further(config)]
    found = [_of_model(Weight(MEGATRON_EMBEDDING, {family.embedding: ("vocab", "hidden")}), vocab)]
    for n, here in enumerate(routed):
        found += _layer(family, attention, sizes, f"model.layers.{n}.", "decoder.layers.", "", (n, layers), here, homogeneous)
    found.append(_of_model(Weight("decoder.final_layernorm.weight", {FINAL_NORM: ("hidden",)}), vocab))
    for n in range(mtp):
        prefix, number = f"model.layers.{layers + n}.", (n, mtp)
        found += [_placed(weight, sizes, prefix, "mtp.layers.", "", number, False) for weight in family.mtp]
        found += _layer(family, attention, sizes, prefix, "mtp.layers.", "transformer_layer.", number, True, False)
    if not tied:
        found.append(_of_model(Weight(MEGATRON_HEAD, {HEAD: ("vocab", "hidden")}), vocab))
    return found


def one_kind(family: Family, routed: Sequence[bool]) -> bool:
    """Whether all layers are alike: Megatron then stacks them, and else wants --moe-layer-freq and names each."""
    return all(routed) or not family.routed


def repeated(family: Family, config: Config, mtp: int) -> dict[str, str]:
    """Tensors that DeepSeek's files hold again for each layer that predicts further tokens, and what they repeat."""
    layers = range(config["num_hidden_layers"], config["num_hidden_layers"] + mtp)
    again = {"embed_tokens.weight": family.embedding, "shared_head.head.weight": HEAD}
    return {f"model.layers.{n}.{name}": of for n in layers for name, of in again.items()}


def _of_model(weight: Weight, sizes: Mapping[str, int]) -> Placed:
    parts = {name: tuple(sizes[size] for size in shape) for name, shape in weight.parts.items()}
    return Placed((weight.megatron,), parts, ONE, sizes)


def _layer(
    family: Family,
    attention: Sequence[Weight],
    sizes: Mapping[str, int],
    prefix: str,
    stack: str,
    within: str,
    layer: tuple[int, int],
    routed: bool,
    stacked: bool,
) -> list[Placed]:
    weights: Sequence[Weight] = [*attention, *(family.routed if routed else family.dense)]
    found = [_placed(weight, sizes, prefix, stack, within, layer, stacked) for weight in weights]
    for expert in range(sizes["experts"]) if routed else ():
        place: dict[str, Any] = {"expert": (expert, sizes["experts"])}
        found += [_placed(weight, sizes, prefix, stack, within, layer, stacked, **place) for weight in family.experts]
    return found


def _placed(
    weight: Weight,
    sizes: Mapping[str, int],
    prefix: str,
    stack: str,
    within: str,
    layer: tuple[int, int],
    stacked: bool,
    expert: tuple[int, int] | None = None,
) -> Placed:
    number = expert[0] if expert else 0
    parts = {prefix + name.format(expert=number): tuple(sizes[size] for size in shape) for name, shape in weight.parts.items()}
    by_first_axis = expert is not None and not any("{expert}" in name for name in weight.parts)
    names = tuple(within + name for name in (weight.megatron, *weight.also))
    return Placed(names, parts, weight.form, sizes, stack, layer, expert, by_first_axis, stacked)
