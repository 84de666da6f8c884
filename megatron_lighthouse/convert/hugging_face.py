"""A Hugging Face folder: its config.json, its tensors, and whether they are what its architecture has."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lighthouse.convert.families import family_of
from megatron_lighthouse.convert.mapping import HEAD, Placed, all_placed, repeated
from megatron_lighthouse.convert.memory import Reused
from megatron_lighthouse.convert.quantized import Dequantized
from megatron_lighthouse.convert.safetensors_files import Safetensors, Stored, Tensors

CONFIG = "config.json"
NO_WEIGHTS = ("*.rotary_emb.inv_freq", "*.attn.masked_bias")
"""Buffers that older files hold, and that follow from config.json."""
SHOWN = 5


COUNTS = """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    max_position_embeddings num_experts num_local_experts num_experts_per_tok moe_intermediate_size sliding_window q_lora_rank
    kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim n_routed_experts n_shared_experts n_group topk_group
    decoder_sparse_step
""".split()
"""Fields of config.json that are numbers above 0, where they are there."""
MAY_BE_NONE = ("num_key_value_heads", "head_dim", "sliding_window")


class _Config(dict[str, Any]):
    def __missing__(self, name: str) -> Any:
        raise ValueError(f"{CONFIG} has no {name}: without it the model's shape is not known.")


def read_config(folder: Path) -> dict[str, Any]:
    """Raises ValueError: no config.json, or none that can be read."""
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} holds no {CONFIG}: name a folder as Hugging Face has it.")
    try:
        return _Config(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no JSON object ({error}): copy it again.") from error


def _check_counts(config: Mapping[str, Any]) -> None:
    for name in COUNTS:
        value = config.get(name, 1)
        if (type(value) is not int or value < 1) and not (value is None and name in MAY_BE_NONE):
            raise ValueError(f"{CONFIG}'s {name} {value!r} must be a whole number above 0.")
    heads, groups = config["num_attention_heads"], config.get("num_key_value_heads") or 1
    if heads % groups:
        raise ValueError(f"{CONFIG}'s num_attention_heads {heads} is no multiple of its num_key_value_heads {groups}.")


class HuggingFace:
    """A model in a folder.

    Args:
        leave_out: shell patterns; tensors that match one are not carried over.
        mtp: whether layers that predict further tokens are carried over.

    Raises:
        ValueError: an architecture, field, tensor or file that cannot be carried over, by name.
    """

    def __init__(self, folder: Path, leave_out: Sequence[str] = (), mtp: bool = True) -> None:
        self.folder = folder
        self.config = read_config(folder)
        self.family = family_of(self.config)
        self.fields = self.family.common(self.config)
        """config.json by the names that all families have."""
        _check_counts(self.fields)
        self.source = Dequantized(Safetensors(folder), self.config)
        there = self.source.stored
        further = self.config.get("num_nextn_predict_layers") or 0
        first = f"model.layers.{self.config['num_hidden_layers']}."
        in_files = bool(self.family.mtp) and any(name.startswith(first) for name in there)
        self.mtp = further if mtp and in_files else 0
        for pattern in leave_out:
            if not _matching(there, [pattern]):
                raise ValueError(f"--leave-out {pattern} is the name of no tensor of {folder}: give one, or leave it out.")
        self.left_out = [*_matching(there, [*leave_out, *NO_WEIGHTS])]
        if in_files and not mtp:
            layers = range(self.config["num_hidden_layers"], self.config["num_hidden_layers"] + further)
            self.left_out += _matching(there, [f"model.layers.{n}.*" for n in layers])
        self._memory = Reused()
        self.tied = self._is_tied()
        self.placed = all_placed(self.family, self.fields, tied=self.tied, mtp=self.mtp)
        self._check()

    def _is_tied(self) -> bool:
        """As transformers does: where config.json says so, but not where the file has another output layer."""
        there = self.source.stored
        if not self.config.get("tie_word_embeddings", False):
            return False
        embedding = self.family.embedding
        return HEAD not in there or (embedding in there and same_bits(self.source.read(embedding), self.source.read(HEAD)))

    def _check(self) -> None:
        wanted = dict(_wanted(self.placed))
        repeats = repeated(self.family, self.config, self.mtp)
        there = {name: stored for name, stored in self.source.stored.items() if name not in self.left_out}
        if missing := [name for name in wanted if name not in there]:
            raise ValueError(f"{self.folder} lacks {listed(missing)}, which {self.family.architecture} has.")
        known = {*wanted, *repeats, *([HEAD] if self.tied else [])}
        if surplus := [name for name in there if name not in known]:
            raise ValueError(
                f"{self.folder} holds {listed(surplus)}, which {self.family.architecture} has not: --leave-out PATTERN leaves "
                "tensors out."
            )
        for name, shape in wanted.items():
            if there[name].shape != shape:
                raise ValueError(f"{name} has shape {[*there[name].shape]}, and by {CONFIG} {[*shape]}.")
            if not there[name].dtype.is_floating_point or there[name].dtype.itemsize < 2:
                raise ValueError(f"{name} is of {there[name].dtype}: float32, bfloat16 and float16 are carried over.")
        for name, of in repeats.items():
            if name in there and not same_bits(self.source.read(name), self.source.read(of)):
                raise ValueError(f"{name} differs from {of}, which Megatron uses in its place: --no-mtp leaves its layer out.")
        for placed in self.placed:
            if len({there[name].dtype for name in placed.parts}) > 1:
                raise ValueError(f"{listed([*placed.parts])} are of several dtypes, and Megatron holds them as one tensor.")

    def read(self, placed: Placed) -> Tensor:
        """Megatron's tensor; it is valid until the next is read."""
        index = placed.expert[0] if placed.by_first_axis and placed.expert else None
        parts = [self.source.read(name, index) for name in placed.parts]
        return placed.form.join(parts, placed.sizes, self._memory.tensor(placed.shape, parts[0].dtype))

    def dtype(self, placed: Placed) -> torch.dtype:
        return self.source.stored[next(iter(placed.parts))].dtype

    def tensors(self) -> dict[str, Tensors]:
        """All that is not left out, by name; what is quantised as bf16."""

        def one(name: str, stored: Stored) -> Tensors:
            return Tensors(name, stored, lambda: self.source.read(name))

        return {name: one(name, stored) for name, stored in self.source.stored.items() if name not in self.left_out}


def whole_shape(placed: Placed, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a tensor of Hugging Face's, with the axis of experts where it has one."""
    return (placed.expert[1], *shape) if placed.by_first_axis and placed.expert else shape


def _wanted(placed: Sequence[Placed]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for one in placed:
        for name, shape in one.parts.items():
            yield name, whole_shape(one, shape)


def _matching(names: Sequence[str] | dict[str, Any], patterns: Sequence[str]) -> list[str]:
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


def listed(names: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same to the bit, NaN and -0 too."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)))
