"""From a checkpoint of Megatron's, of any layout, to a Hugging Face folder."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from megatron_lighthouse.bars import bar
from megatron_lighthouse.convert import files, hybrid, safetensors_files
from megatron_lighthouse.convert.arguments import changed_fields, model_words, namespace, updated
from megatron_lighthouse.convert.families import family_of, fla
from megatron_lighthouse.convert.family import Config
from megatron_lighthouse.convert.hugging_face import CONFIG, listed, read_config, whole_shape
from megatron_lighthouse.convert.mapping import HEAD, MEGATRON_HEAD, VOCABULARY, Placed, all_placed, repeated
from megatron_lighthouse.convert.memory import Reused
from megatron_lighthouse.convert.safetensors_files import Stored, Tensors
from megatron_lighthouse.convert.to_megatron import RECORD
from megatron_lighthouse.convert.torch_dist import latest, stored_arguments
from megatron_lighthouse.convert.torch_dist_reader import TorchDist

MAY_DIFFER = """
    attention wall_gate_bias
    position_embedding_type rotary_base rotary_scaling_factor rotary_seq_len_interpolation_factor use_rope_scaling
    rope_scaling_factor yarn_original_max_position_embeddings yarn_beta_fast yarn_beta_slow mscale mscale_all_dim rope_type
    yarn_correction_range_round_to_int max_position_embeddings padded_vocab_size attention_dropout hidden_dropout
    group_query_attention mtp_num_layers untie_embeddings_and_output_weights moe_router_dtype
""".split()
"""Arguments that a run may change, or that do not change the model."""
UNSAID = {
    **{"softmax_type": "vanilla", "window_size": None, "attention_output_gate": False, "qk_layernorm": False},
    **{"qk_l2_norm": False, "layernorm_zero_centered_gamma": False, "no_rope_freq": None, "rotary_percent": 1.0},
    **{
        "window_attn_skip_freq": None,
        "rotary_interleaved": False,
        "squared_relu": False,
        "quick_geglu": False,
        "activation_func_clamp_value": None,
    },
}
"""Arguments that change the model, and what they are where a family does not say them."""


class Megatron:
    """A checkpoint as the tensors of Hugging Face that it makes.

    Args:
        folder: what the run was given as --save, or what `hf-to-megatron` wrote.
        step: which iteration; the newest where None.
        like: a folder with config.json and tokenizer: of Hugging Face, or what `hf-to-megatron` wrote.

    Raises:
        ValueError: a checkpoint that is not whole, of a newer torch, or of another model than config.json says.
    """

    def __init__(self, folder: Path, step: int | None = None, like: Path | None = None, mtp: bool = True) -> None:
        _check_torch(folder)
        checkpoint = latest(folder, step)
        self.args = stored_arguments(checkpoint) or Namespace()
        if layers := hybrid.pairs(self.args):
            self.args = Namespace(**{**vars(self.args), "num_layers": layers})
        self._stored = TorchDist(checkpoint, hybrid.gpt_name if layers else str)
        self.like = _like(folder, self.args, like)
        self.before = read_config(self.like)
        there = set(self._stored.weights())
        begun: Config = self.before
        if (streams := fla.streams_of(there)) and "num_heads" not in begun:
            begun = fla.with_streams(begun, streams, self.args)
        self.family = family_of(begun)
        self._fields = self.family.common(begun)
        self.tied = MEGATRON_HEAD not in there
        has_mtp = any(key.startswith("mtp.") for key in there)
        self.mtp = (self.before.get("num_nextn_predict_layers") or 1) if has_mtp and mtp and self.family.mtp else 0
        self._check_arguments()
        self._placed = all_placed(self.family, self._fields, tied=self.tied, mtp=self.mtp)
        self._keys = {id(placed): self._find(placed, there) for placed in self._placed}
        used = {name for placed in self._placed for name, _ in placed.candidates()}
        surplus = sorted(key for key in there - used if mtp or not key.startswith("mtp."))
        if surplus:
            raise ValueError(f"{checkpoint} holds {listed(surplus)}, which {self.family.architecture} has not.")
        self.vocab = min(self.before["vocab_size"], self._stored.tensors[VOCABULARY[0]].size[0])
        self._last: tuple[int, list[Tensor]] = (-1, [])
        self._memory = Reused()
        dtype = str(self._stored.tensors[VOCABULARY[0]].properties.dtype).removeprefix("torch.")
        args = self.args if hasattr(self.args, "rotary_base") else namespace(self._words())
        self.config = updated(begun, self.family, args, vocab=self.vocab, dtype=dtype, tied=self.tied)

    def _words(self) -> list[str]:
        return model_words(self.family, self._fields, tied=self.tied, mtp=self.mtp)

    def _check_arguments(self) -> None:
        """Whether the run computed what config.json says: its weights do not tell."""
        said = {**UNSAID, **vars(namespace(self._words()))}
        paired = ("moe_layer_freq",) if hybrid.pairs(self.args) else ()  # its pattern says it
        for name, value in said.items():
            if name in MAY_DIFFER or name in paired or not hasattr(self.args, name):
                continue
            if (had := getattr(self.args, name)) != value and not (name in UNSAID and had is None):
                raise ValueError(
                    f"{self.like / CONFIG} asks for {name} {value}, and the run that wrote {self._stored.folder} had {had}: "
                    "the export would be another model."
                )

    def _find(self, placed: Placed, there: set[str]) -> tuple[str, list[tuple[int, int]]]:
        candidates = [*placed.candidates()]
        found = [(key, axes) for key, axes in candidates if key in there]
        if not found:
            raise ValueError(f"{self._stored.folder} lacks {candidates[0][0]}, which {self.family.architecture} has.")
        key, axes = found[0]
        size = tuple(self._stored.tensors[key].size)
        wanted = (*[count for _, count in axes], *placed.shape)
        if (size[1:] != wanted[1:]) if key in VOCABULARY else size != wanted:
            raise ValueError(f"{key} has shape {[*size]} in {self._stored.folder}, and by {self.like / CONFIG} {[*wanted]}.")
        self._stored.check_whole(key)
        return key, axes

    def tensors(self) -> list[Tensors]:
        """In the order of the model."""
        experts: dict[str, list[Placed]] = {}
        for placed in self._placed:
            for name in placed.parts:
                experts.setdefault(name, []).append(placed)
        made = [self._tensor(name, owners) for name, owners in experts.items()]
        by_name = {tensor.name: tensor for tensor in made}
        again = {name: of for name, of in repeated(self.family, self.before, self.mtp).items() if of in by_name}
        if self.tied and self._head_was_there():
            again[HEAD] = self.family.embedding
        return made + [Tensors(name, by_name[of].stored, by_name[of].read) for name, of in again.items()]

    def _head_was_there(self) -> bool:
        record = self.like.parent / RECORD
        return record.is_file() and bool(json.loads(record.read_text()).get("output_layer_in_files"))

    def _tensor(self, name: str, owners: list[Placed]) -> Tensors:
        first = owners[0]
        key, _ = self._keys[id(first)]
        shape = whole_shape(first, first.parts[name])
        shape = (self.vocab, *shape[1:]) if key in VOCABULARY else shape
        which, dtype = [*first.parts].index(name), self._stored.tensors[key].properties.dtype

        def read() -> Tensor:
            if not first.by_first_axis:
                return self._split(first)[which]
            experts = self._memory.tensor((len(owners), *first.parts[name]), dtype)
            for expert, owner in zip(experts, owners, strict=True):
                expert.copy_(self._split(owner)[which])
            return experts

        return Tensors(name, Stored(shape, dtype), read)

    def _split(self, placed: Placed) -> list[Tensor]:
        """The last one read stays, for several tensors of Hugging Face come from one."""
        if self._last[0] != id(placed):
            key, axes = self._keys[id(placed)]
            shape = (self.vocab, *placed.shape[1:]) if key in VOCABULARY else placed.shape
            offsets = (*[number for number, _ in axes], *[0] * len(shape))
            self._last = (-1, [])
            whole = self._stored.read(key, offsets, (*[1] * len(axes), *shape)).reshape(shape)
            self._last = (id(placed), [whole] if key in VOCABULARY else placed.split(whole))
        return self._last[1]


def convert(
    source: Path, target: Path, *, force: bool, step: int | None, like: Path | None, mtp: bool, shard: int
) -> list[str]:
    """Write `target`, and say which fields of config.json are new.

    Raises:
        ValueError: whatever stands against it, before anything is written.
    """
    model = Megatron(source, step, like, mtp)
    files.check_apart(source, target)
    files.check_apart(model.like, target)
    tensors = model.tensors()
    total = sum(tensor.bytes for tensor in tensors)
    files.check_target(target, force, total, (CONFIG,))
    with files.replacing(target) as folder, bar(total=total, unit="B", unit_scale=True) as progress:
        safetensors_files.write(folder, tensors, shard, progress.update)
        files.carry(model.like, folder)
        (folder / CONFIG).write_text(json.dumps(model.config, indent=2, ensure_ascii=False) + "\n")
    return [
        f"{target}: {len(tensors)} tensors, {total / 1e9:.2f} GB, of {model.family.architecture}",
        *(f"{CONFIG}: {line}" for line in changed_fields(model.before, model.config)),
        *([] if mtp or not model.family.mtp else ["left out: layers that predict further tokens (--no-mtp)"]),
    ]


def _check_torch(folder: Path) -> None:
    """Of what `hf-to-megatron` wrote, which says its torch."""
    record = folder / RECORD
    if not record.is_file():
        return
    wrote, here = (Version(text) for text in (json.loads(record.read_text())["torch"], torch.__version__))
    if wrote.release[:2] > here.release[:2]:
        raise ValueError(
            f"{folder} was written by torch {wrote}, which torch {here} here cannot read: install torch {wrote.public}."
        )


def _like(folder: Path, args: Namespace, given: Path | None) -> Path:
    """Where config.json and the tokenizer are: --like, this folder's own, or those that the run began from."""
    if given is not None:
        return given / files.CARRIED if (given / files.CARRIED / CONFIG).is_file() else given
    named: list[Any] = [getattr(args, name, None) for name in ("pretrained_checkpoint", "load")]
    for place in [folder, *(Path(name) for name in named if name)]:
        if (place / files.CARRIED / CONFIG).is_file():
            return place / files.CARRIED
    raise ValueError(
        f"{folder} does not say which model it began as: give --like FOLDER, of Hugging Face or what hf-to-megatron wrote."
    )
