"""A run: model, attention, length, device and layout, and the rules that these must keep."""

from __future__ import annotations

import tomllib
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from typing import Any

from megatron_lighthouse.context_parallel.schemes import COMM_TYPES
from megatron_lighthouse.lighthouse.config import LighthouseConfig
from megatron_lighthouse.lighthouse.geometry import Geometry, Shape
from megatron_lighthouse.mcore.command_line import graphs, tiles
from megatron_lighthouse.mcore.command_line.checks import model_problems
from megatron_lighthouse.mcore.command_line.documents import document_problems
from megatron_lighthouse.mcore.command_line.settings import LighthouseSettings, of_edge
from megatron_lighthouse.nearest import divisors, either, multiples
from megatron_lighthouse.plan.device import DEVICES, Device
from megatron_lighthouse.plan.documents import DocumentGeometry, Mix
from megatron_lighthouse.plan.model import GPT
from megatron_lighthouse.variant import Variant
from megatron_lighthouse.variants import LIGHTHOUSE, VARIANTS, counted
from megatron_lighthouse.work import Work

RECOMPUTE = ("none", "mlp", "full")
"""No layer's forward again in backward; that of the MLP (--recompute-modules mlp); or that of whole layers."""


@dataclass(frozen=True)
class Run:
    """Micro batches hold one sequence. The optimizer is distributed; with tensor parallelism sequence parallelism is on."""

    model: GPT
    seq_length: int
    device: Device = DEVICES["b200"]
    attention: str = LIGHTHOUSE.name
    config: LighthouseConfig = None  # type: ignore[assignment]
    """What the length asks for where none is given."""
    gpus: int = 1
    tensor_parallel: int = 1
    context_parallel: int = 1
    pipeline_parallel: int = 1
    global_batch: int = 1
    recompute: str = "none"
    cp_comm_type: str = "p2p"
    discard_output: bool = True
    edge_budget: int | None = None
    """Of a Lighthouse run's first and last layers, where they are not dense."""
    loss_fusion: bool = False
    """--cross-entropy-loss-fusion."""
    gradient_bytes: int = 4
    """Of a parameter's gradient, as it is kept and summed over ranks: 2 with --grad-reduce-in-bf16."""
    loss_tile_tokens: int | None = None
    mlp_tile_tokens: int = 0
    documents: Mix | None = None
    """Of packed rows; None: a sequence is one document."""
    around: Any = None  # the config of `base`, where it has one; None for its defaults
    options: dict[str, Any] = field(default_factory=dict)
    """What else of the model, by the names of Megatron's TransformerConfig, an attention may refuse."""

    def __post_init__(self) -> None:
        if self.config is None:
            object.__setattr__(self, "config", LighthouseConfig.for_length(self.seq_length))

    @property
    def variant(self) -> Variant:
        """That of `--attention`."""
        return VARIANTS[self.attention]

    @property
    def base(self) -> Variant:
        """What its layers are where they do not select."""
        return self.variant.base(self.config)

    @property
    def work(self) -> Work:
        """What `base` takes beside softmax attention."""
        return self.base.work(self.around, self.layer)

    @property
    def stream_columns(self) -> int:
        """Of each layer's projections to streams, on all tensor-parallel ranks."""
        sizes = self.model.heads, self.model.groups, self.model.head_dim
        return sum(stream.columns(*sizes) for stream in self.base.streams_of(self.around))

    @property
    def rotated_columns(self) -> int:
        """Of queries, keys, and streams that turn with them."""
        of = self.model.heads, self.model.groups, self.model.head_dim
        streams = sum(stream.columns(*of) for stream in self.base.streams_of(self.around) if stream.rotated)
        return (of[0] + of[1]) * of[2] + streams if self.base.is_turned(self.around) else 0

    @property
    def layer_matrices(self) -> int:
        """Parameters in the matrices of one layer, those of streams among them."""
        return self.model.layer_matrices + self.model.hidden * self.stream_columns

    @property
    def parameters(self) -> int:
        """All parameters of the model."""
        return self.model.parameters + self.model.layers * self.model.hidden * self.stream_columns

    @property
    def spans(self) -> dict[str, int]:
        """Over how many neighbours, in Megatron's order of ranks (tensor, context, data, pipeline), a group's messages go.

        Where not all GPUs are in one NVLink domain, some neighbours in the pipeline are in different ones, and set the pace.
        Where all are, no group can straddle domains, whatever its size: each counts as one GPU.
        """
        tp, pp = self.tensor_parallel, self.pipeline_parallel
        groups = {"tensor parallel": tp, "context parallel": tp * self.context_parallel}
        groups |= {"pipeline": self.gpus if pp > 1 else 1, "data parallel": self.gpus // pp}
        return dict.fromkeys(groups, 1) if self.gpus <= self.device.domain else groups

    @property
    def stages(self) -> list[tuple[int, int]]:
        """(dense, Lighthouse) layers of each pipeline stage: each has as many of the model's layers, in their order.

        With a budget of their own, those that would be dense are the edge layers.
        """
        model, size = self.model, self.model.layers // self.pipeline_parallel
        first, last = model.dense_first, model.layers - model.dense_last  # Lighthouse from `first` on, before `last`
        if not self.variant.selects:
            first = last
        starts = [size * stage for stage in range(self.pipeline_parallel)]
        ours = [max(0, min(last, start + size) - max(first, start)) for start in starts]
        return [(size - count, count) for count in ours]

    def check(self) -> Run:
        """This run. Raises ValueError, naming flag, value, rule and values that work, where it cannot be."""
        model, tp, cp, pp = self.model, self.tensor_parallel, self.context_parallel, self.pipeline_parallel
        for flag, value in (
            *(("--tensor-model-parallel-size", tp), ("--context-parallel-size", cp), ("--pipeline-model-parallel-size", pp)),
            *(("--gpus", self.gpus), ("--seq-length", self.seq_length), ("--global-batch-size", self.global_batch)),
        ):
            if value < 1:
                raise ValueError(f"{flag} {value} must be at least 1: use 1 or more.")
        check_names(self.attention, self.recompute, self.cp_comm_type)
        if model.groups % tp or model.ffn % tp or model.hidden % tp:
            raise ValueError(
                f"--tensor-model-parallel-size {tp} must divide the {model.groups} key/value heads, hidden size {model.hidden} "
                f"and FFN size {model.ffn}: use {either(divisors(model.groups))}."
            )
        if model.layers % pp:
            raise ValueError(
                f"--pipeline-model-parallel-size {pp} must divide --num-layers {model.layers}: "
                f"use {either(divisors(model.layers))}."
            )
        if self.gpus % (one := tp * cp * pp):
            use = max(1, self.gpus // one) * one
            raise ValueError(f"--gpus {self.gpus} must be a multiple of TP {tp} x CP {cp} x PP {pp} = {one}: use {use}.")
        if self.global_batch % (dp := self.data_parallel):
            raise ValueError(
                f"--global-batch-size {self.global_batch} must be a multiple of the {dp} data-parallel ranks: "
                f"use {either(multiples(self.global_batch, dp))}."
            )
        if self.documents and (found := [*self._document_problems()]):
            raise ValueError("\n".join(found))
        if found := [*graphs.problems(asked := self._as_megatron()), *tiles.problems(asked)]:
            raise ValueError("\n".join(found))
        if self.variant.selects:
            length = None if self.documents else self.seq_length
            if found := [*model_problems(asked, self.settings, length)]:
                raise ValueError("\n".join(found))
        elif cp > 1 and self.seq_length % (2 * cp):
            raise ValueError(
                f"--seq-length {self.seq_length} must be a multiple of {2 * cp}, two chunks for each of "
                f"--context-parallel-size {cp}: use {either(multiples(self.seq_length, 2 * cp))}."
            )
        if self.seq_length % (cp * tp):
            raise ValueError(
                f"--seq-length {self.seq_length} must be a multiple of {cp * tp}, for sequence parallelism shares out "
                f"each rank's tokens: use {either(multiples(self.seq_length, cp * tp))}."
            )
        if self.cp_comm_type == "a2a" and self.layer.groups % cp:
            raise ValueError(
                f"--cp-comm-type a2a shares out the {self.layer.groups} key/value heads of a tensor-parallel rank among "
                f"--context-parallel-size {cp}, which must divide them: use --cp-comm-type p2p, or --context-parallel-size "
                f"{either(divisors(self.layer.groups))}."
            )
        return self

    @property
    def logits_at_once(self) -> int:
        """Tokens whose logits the last stage holds at once."""
        tile = tiles.tile_tokens(self.loss_tile_tokens, self.vocab_rank)
        return min(self.tokens, tile or self.tokens)

    def _document_problems(self) -> Iterator[str]:
        yield from document_problems(Namespace(dataloader_inter_document_masking=True), self._as_megatron())
        if self.variant.selects:
            yield from self.variant.document_problems(self.config, self.context_parallel)

    @property
    def settings(self) -> LighthouseSettings:
        """What the run asks of Lighthouse."""
        around = self.around or (self.base.config and self.base.config())
        how = (self.config, self.model.dense_first, self.model.dense_last, self.discard_output)
        return LighthouseSettings(*how, edge_budget=self.edge_budget, around=around)

    def _as_megatron(self) -> Namespace:
        """Those fields of Megatron's TransformerConfig that its refusals read."""
        model = self.model
        own: dict[str, Any] = {"num_layers": model.layers, "num_attention_heads": model.heads, "num_query_groups": model.groups}
        own |= {"tensor_model_parallel_size": self.tensor_parallel, "context_parallel_size": self.context_parallel}
        own |= {"recompute_granularity": "full" if self.recompute == "full" else None, "mlp_tile_tokens": self.mlp_tile_tokens}
        own |= {"cp_comm_type": self.cp_comm_type, "transformer_impl": "transformer_engine", "flash_decode": False}
        off = {"skip_train": True, "attention_dropout": 0.0, "window_size": None, "multi_latent_attention": False}
        return Namespace(**{**off, **own, **self.options})

    @property
    def geometry(self) -> Geometry:
        """Lighthouse's integers. Raises ValueError where length, config and context parallelism do not fit."""
        if self.documents:
            return DocumentGeometry.of(self.config, self.documents.row(self.seq_length))
        return LIGHTHOUSE.cost(self.config, self.seq_length, self.context_parallel)

    @property
    def edge(self) -> Geometry | None:
        """Of the layers with a budget of their own; None where there are none. Raises ValueError as `geometry`."""
        if self.edge_budget is None or not self.variant.selects:
            return None
        if self.documents:  # whose budget is a tile's
            return self.geometry
        try:
            config = self.config.replace(budget=self.edge_budget)
            return self.variant.cost(config, self.seq_length, self.context_parallel)
        except ValueError as error:
            raise ValueError(of_edge(str(error))) from None

    @property
    def data_parallel(self) -> int:
        return self.gpus // (self.tensor_parallel * self.context_parallel * self.pipeline_parallel)

    @property
    def micro_batches(self) -> int:
        """Sequences that a data-parallel rank takes in a step."""
        return self.global_batch // self.data_parallel

    @property
    def tokens(self) -> int:
        """Tokens of a sequence on one context-parallel rank."""
        return self.seq_length // self.context_parallel

    @property
    def layer(self) -> Shape:
        """Inputs of a layer's attention on one tensor-parallel rank, bf16."""
        model, tp = self.model, self.tensor_parallel  # of fewer key/value heads than ranks several have the same one
        return Shape(1, model.heads // tp, max(1, model.groups // tp), model.head_dim, 2)

    @property
    def lighthouse_layers(self) -> int:
        if not self.variant.selects:
            return 0
        return self.model.lighthouse_layers if self.edge_budget is None else self.model.layers

    @property
    def vocab_rank(self) -> int:
        """Rows of the vocabulary on a tensor-parallel rank, padded to 128 as Megatron does."""
        return -(-self.model.vocab // (128 * self.tensor_parallel)) * 128

    def change(self, **changes: Any) -> Run:
        """A copy with `changes`."""
        return replace(self, **changes)


def check_names(attention: str | None, recompute: str | None, cp_comm_type: str | None) -> None:
    """Raises ValueError, naming those that work, where one of these is not known; None is not given."""
    for flag, name, known in (
        *(("--attention", attention, counted()), ("--recompute", recompute, RECOMPUTE)),
        ("--cp-comm-type", cp_comm_type, COMM_TYPES),
    ):
        if name is not None and name not in known:
            raise ValueError(f"{flag} {name!r} is not known: use {' or '.join(known)}.")


@cache
def recipes() -> dict[str, dict[str, Any]]:
    """The tables of recipes.toml, by name."""
    return tomllib.loads((files("megatron_lighthouse.plan") / "recipes.toml").read_text())


def run_of(name: str, **changes: Any) -> Run:
    """The run of a recipe, with `changes`, and the pyramid of its length with the fields of `lighthouse`.

    Raises ValueError where the recipe is not known.
    """
    known = recipes()
    if name not in known:
        raise ValueError(
            f"--recipe {name!r} is none that the plan counts, of Llamas: use {' or '.join(known)}, or a file of arguments."
        )
    table = {key: value for key, value in {**known[name], **changes}.items() if key != "description"}
    lighthouse = {**known[name].get("lighthouse", {}), **table.pop("lighthouse", {})}
    config = LighthouseConfig.for_length(table["seq_length"], **lighthouse)
    return Run(**{"config": config, **table, "model": GPT(**table["model"])})
