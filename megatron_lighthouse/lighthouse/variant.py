"""Lighthouse as a variant: what Megatron's side, the plan and the scripts ask of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from megatron_lighthouse import running
from megatron_lighthouse.lighthouse.around import AROUND
from megatron_lighthouse.lighthouse.causal_rules import causal_documents_problem, scorers_for
from megatron_lighthouse.lighthouse.config import LighthouseConfig, flag
from megatron_lighthouse.lighthouse.geometry import Geometry, Shape
from megatron_lighthouse.lighthouse.heads import documents_problem
from megatron_lighthouse.lighthouse.remedies import Allowed, anything
from megatron_lighthouse.lighthouse.scorers import SCORERS
from megatron_lighthouse.lighthouse.sharded.sent import layer_bytes, summary
from megatron_lighthouse.options import as_words, errors_in_flags, in_flags
from megatron_lighthouse.sequence.layout import Layout
from megatron_lighthouse.usage import as_flag
from megatron_lighthouse.variant import Place, Variant

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_lighthouse.lighthouse.layer import Layer
    from megatron_lighthouse.lighthouse.packed.layer import PackedLayer
    from megatron_lighthouse.lighthouse.packed.sharded import ShardedPackedLayer
    from megatron_lighthouse.sequence.documents import Documents
    from megatron_lighthouse.softmax.backends import Attend
    from megatron_lighthouse.softmax.documents import AttendDocuments
    from megatron_lighthouse.softmax.rows import RowKind


@dataclass(frozen=True)
class Placed:
    """A layer in its place in the model, whose selections are watched, and whose output can be scattered again."""

    layer: Layer
    place: Place
    base: Variant
    """What it is around."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *streams: Tensor,
        attend: Attend | None = None,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, Callable[[], Tensor] | None]:
        import torch

        with running.layer(self.place.number):
            streams = self.base.of_projections(self.place.around, streams, self.place.rotary)
            attended = self.layer.attended(query, key, value, *streams, attend=attend, sinks=sinks)
            output = attended.scatter()
        if not self.place.discard_output or not output.requires_grad or torch.compiler.is_compiling():
            return output, None
        rows, halo = attended.rows.detach(), None if attended.halo is None else attended.halo.detach()
        return output, partial(attended.steps.scatter, rows, attended.selection, halo)


@dataclass(frozen=True)
class PlacedDocuments:
    """As `Placed`, over packed documents."""

    layer: PackedLayer | ShardedPackedLayer
    place: Place
    base: Variant

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *streams: Tensor,
        documents: Documents,
        attend: AttendDocuments | None = None,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, Callable[[], Tensor] | None]:
        with running.layer(self.place.number):
            streams = self.base.of_projections(self.place.around, streams, self.place.rotary)
            rows: Callable[..., Any] = self.layer.attended  # of several ranks, without streams
            attended = rows(query, key, value, *streams, documents=documents, attend=attend, sinks=sinks)
            output = attended.scatter()
        # where nothing is scattered, the output is the rows, which the inner attention keeps
        if not self.place.discard_output or not output.requires_grad or attended.is_whole:
            return output, None
        return output, replace(attended, rows=attended.rows.detach()).scatter


class Lighthouse(Variant):
    """Lighthouse Attention (arXiv 2605.06554): no weights of its own."""

    name, title = "lighthouse", "Lighthouse"
    help = "selects a small set of pyramid entries and attends densely to it, with the checkpoints of 'dense'"
    config = LighthouseConfig
    switches = selects = counted = latent = True

    def base(self, config: LighthouseConfig) -> Variant:
        return AROUND[config.around]

    def base_in(self, args: Any) -> Variant:
        return AROUND.get(getattr(args, "lighthouse_around", LighthouseConfig.around), self)

    def base_attends(self, config: LighthouseConfig, of_te: bool, local: bool) -> bool:
        """Transformer Engine's does, unless another is forced. Megatron's local one would keep all scores, so it does not."""
        if not self.base(config).native:
            return False
        return (of_te and config.inner == "te") or (config.inner == "auto" and not local)

    def dropout_problems(self, dropout: float) -> Iterator[str]:
        if dropout:
            yield f"--attention-dropout {dropout} would drop whole windows: use --attention-dropout 0 (--hidden-dropout works)."

    def length_problems(
        self, config: LighthouseConfig, seq_length: int, ranks: int, allowed: Allowed = anything
    ) -> Iterator[str]:
        """Why so many tokens on so many context-parallel ranks do not fit the pyramid or the scorer."""
        try:
            config.geometry(seq_length, ranks, allowed)
        except ValueError as error:
            yield in_flags(str(error))
        else:
            if message := config.scorer_problem(seq_length, ranks, allowed):
                yield in_flags(message)

    def document_problems(self, config: LighthouseConfig, ranks: int) -> Iterator[str]:
        """Why documents cannot be ranked."""
        problems = (documents_problem(config), causal_documents_problem(config))
        for problem in (SCORERS[config.scorer].packed_problem(config.rule.window), *problems):
            if problem:
                yield in_flags(problem)
        if ranks > 1 and config.around != "softmax":
            yield (
                f"--dataloader-inter-document-masking with --context-parallel-size {ranks} is not done with "
                f"{flag('around')} {config.around}: use {flag('around')} softmax, or --context-parallel-size 1."
            )

    def graph_problems(self, config: LighthouseConfig, seq_length: int, ranks: int, graphs: str) -> Iterator[str]:
        """How many rows go to which rank is read by the host, in every layer."""
        if ranks == 1 or config.geometry(seq_length, ranks).is_local(ranks):
            return
        fits = config.budget // (2 * ranks)
        other = f" (such as {fits})" if config.budget % (4 * ranks) == 0 else ""  # tile budgets are even
        yield (
            f"--cuda-graph-impl {graphs} cannot capture rows that are dealt out to --context-parallel-size {ranks} ranks, as "
            f"with {flag('budget')} {config.budget} and {flag('tile_budget')} {config.tile_budget}: leave it out, or use a "
            f"{flag('tile_budget')} that makes their quotient a multiple of {2 * ranks}{other}."
        )

    def problems(self, config: LighthouseConfig, model: Any) -> Iterator[str]:
        yield from self.dropout_problems(model.attention_dropout)
        if SCORERS[config.scorer].by_length:
            *more, last = (name for name in scorers_for(config) if not SCORERS[name].by_length)
            others = f"{', '.join(more)} or {last}"
            for name in ("qk_layernorm", "qk_l2_norm"):
                if getattr(model, name, False) and not getattr(model, "multi_latent_attention", False):  # MLA norms latents
                    yield (
                        f"{as_flag(name)} makes all queries and keys nearly equally long, so that {flag('scorer')} "
                        f"{config.scorer}, which goes by their length, selects at random: leave it out, or use "
                        f"{flag('scorer')} {others}."
                    )
        for name in ("qk_clip", "log_max_attention_logit"):
            if getattr(model, name, False):
                yield (
                    f"{as_flag(name)} goes by the greatest logit of a layer, which Lighthouse has of gathered rows alone, not "
                    "of tokens: leave it out, or use --attention dense."
                )
        if not self.base(config).native and (window := getattr(model, "window_size", None)):
            ours = f"{flag('around')} {config.around}"
            yield f"{as_words('--window-size', window)} is not done by {ours}: leave it out, or use --attention dense."
        yield from self.groups_problems(model)

    def check_installed(self, config: LighthouseConfig, inputs: RowKind, place: Place) -> None:
        import torch

        from megatron_lighthouse.lighthouse.implementations import steps_for
        from megatron_lighthouse.softmax.inputs import check_backend

        rows = torch.empty(0, inputs.dim, dtype=inputs.dtype, device=inputs.device)
        with errors_in_flags():
            SCORERS[config.scorer].check_installed(steps_for(config.steps, rows), inputs.device)
            if not place.base_attends and self.base(config).native:
                ranks = place.exchange.size if place.exchange else 1
                check_backend(config.inner, inputs, ranks, place.comm_type, place.sinks)

    def build(self, config: LighthouseConfig, query: Tensor, key: Tensor, place: Place) -> Placed:
        from megatron_lighthouse.lighthouse.layer import build

        with errors_in_flags():
            return Placed(build(config, query, key, self._for_rows(config, place)), place, self.base(config))

    def _for_rows(self, config: LighthouseConfig, place: Place) -> Place:
        """Less the rotation, around what reads that for itself: then --lighthouse-rope is mean."""
        return replace(place, rotary=None) if self.base(config).rotary_problem() else place

    def build_documents(self, config: LighthouseConfig, query: Tensor, key: Tensor, place: Place) -> PlacedDocuments:
        from megatron_lighthouse.lighthouse.packed.layer import build_packed

        with errors_in_flags():
            return PlacedDocuments(build_packed(config, query, key, self._for_rows(config, place)), place, self.base(config))

    def cost(self, config: LighthouseConfig, seq_length: int, ranks: int) -> Geometry:
        with errors_in_flags():
            return config.geometry(seq_length, ranks)

    def sent(
        self, config: LighthouseConfig, seq_length: int, shape: Shape, layout: Layout, comm_type: str, around: Any = None
    ) -> dict[str, tuple[int, int]]:
        geometry = config.geometry(seq_length, layout.size)
        what = (config.scorer, self.base(config), around, config.causal_selection)
        return layer_bytes(comm_type, geometry, shape, layout, *what)

    def summary(
        self, config: LighthouseConfig, seq_length: int, shape: Shape, ranks: int, comm_type: str, around: Any = None
    ) -> str:
        what = (config.scorer, self.base(config), around, config.causal_selection)
        return summary(config.geometry(seq_length, ranks), shape, ranks, comm_type, *what)


LIGHTHOUSE = Lighthouse()
