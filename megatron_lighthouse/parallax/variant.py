"""Parallax as a variant: what Megatron's side, the plan and the scripts ask of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_lighthouse import running
from megatron_lighthouse.lighthouse.geometry import Shape
from megatron_lighthouse.lighthouse.sharded.sent import attend_bytes
from megatron_lighthouse.parallax.config import ParallaxConfig
from megatron_lighthouse.sequence.layout import Layout
from megatron_lighthouse.variant import Place, Stream, Variant
from megatron_lighthouse.work import Work

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_lighthouse.context_parallel.ring import Passage
    from megatron_lighthouse.parallax.layer import Layer
    from megatron_lighthouse.running import Telemetry
    from megatron_lighthouse.sequence.documents import Documents
    from megatron_lighthouse.softmax import backends
    from megatron_lighthouse.softmax.documents import AttendDocuments
    from megatron_lighthouse.softmax.rows import RowKind

FLOAT64 = 8
"""Bytes."""


@dataclass(frozen=True)
class Placed:
    """A layer in its place in the model."""

    layer: Layer
    number: int

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *streams: Tensor, attend: backends.Attend | None = None
    ) -> tuple[Tensor, Callable[[], Tensor] | None]:
        (r,) = streams
        with running.layer(self.number):
            return self.layer(query, r, key, value), None


@dataclass(frozen=True)
class PlacedDocuments:
    """As `Placed`, over packed documents, each as if it were alone."""

    kernels: str
    scale: float | None
    number: int = 0

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *streams: Tensor,
        documents: Documents,
        attend: AttendDocuments | None = None,
    ) -> tuple[Tensor, Callable[[], Tensor] | None]:
        from megatron_lighthouse.ranges import profiled

        (r,) = streams
        with running.layer(self.number), profiled("attend"):
            return self.over_rows(query, key, value, documents, r), None

    def over_rows(self, query: Tensor, key: Tensor, value: Tensor, documents: Documents, r: Tensor) -> Tensor:
        """[t, 1, H, D]."""
        from megatron_lighthouse.parallax.layer import build

        layer = build(query, key, softmax_scale=self.scale, cu_seqlens=documents.cu_seqlens, kernels=self.kernels)
        return layer.over_rows(query, r, key, value)


@dataclass(frozen=True, eq=False)  # as softmax.variant.Rows
class Rows:
    """Over the rows that Lighthouse gathers. Keys are centred before they travel, so none sets out as it is gathered."""

    layer: Layer

    def passage(self) -> None:
        return None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *streams: Tensor, passage: Passage | None = None) -> Tensor:
        (r,) = streams
        return self.layer.over_rows(query, r, key, value)


class Parallax(Variant):
    """Parallax (arXiv 2605.29157): a projection R of its own."""

    name, title = "parallax", "Parallax"
    help = "subtracts from softmax attention the covariance of its values with a further projection, linear_r"
    config = ParallaxConfig
    streams = (Stream("r", like_queries=True, zero_at_first=True),)
    dense_weights = False
    copies_groups = True
    logs = True
    around = "parallax"
    counted = True

    def telemetry(self, config: ParallaxConfig) -> Telemetry:
        from megatron_lighthouse.parallax.telemetry import Corrections

        return Corrections()

    def work(self, config: ParallaxConfig | None, shape: Shape) -> Work:
        kept = 2  # r and Σ p v, beside the output
        return Work(2.1, 2.3, kept=kept, rows_kept=kept, assumed="as its kernels to cuDNN's on an H200")

    def problems(self, config: ParallaxConfig, model: Any) -> Iterator[str]:
        yield from super().problems(config, model)
        yield from self.groups_problems(model)

    def remarks(self, config: ParallaxConfig, args: Any) -> Iterator[str]:
        if "muon" not in args.optimizer:
            yield (
                f"parallax: --optimizer {args.optimizer}: the paper (arXiv 2605.29157) finds that Muon unlocks the gains of "
                "Parallax: consider --optimizer muon, which needs the package emerging_optimizers."
            )
            if not (args.qk_layernorm or args.qk_l2_norm):
                yield (
                    "parallax: nothing bounds the products of r and keys without --qk-layernorm: by Adam, at a rate of 1.5e-3, "
                    "a model of 39M parameters lost its training to that (docs/quality_appendix.md). Consider it, or a lower "
                    "rate."
                )

    def build(self, config: ParallaxConfig, query: Tensor, key: Tensor, place: Place) -> Placed:
        return Placed(_layer(config, query, key, place), place.number)

    def build_rows(self, inner: str, query: Tensor, key: Tensor, place: Place) -> Rows:
        if place.sinks:
            raise ValueError(
                f"sinks are not done by config.around {self.around}: leave them out, or use config.around softmax."
            )
        if place.value_dim not in (None, query.shape[3]):
            raise ValueError(
                f"values of {place.value_dim} channels beside keys of {query.shape[3]} are not done by config.around "
                f"{self.around}: use config.around softmax."
            )
        return Rows(_layer(place.around or ParallaxConfig(), query, key, place))

    def build_document_rows(self, inner: str, query: Tensor, key: Tensor, place: Place) -> Callable[..., Tensor]:
        return PlacedDocuments((place.around or ParallaxConfig()).kernels, place.scale).over_rows

    def document_problems(self, config: ParallaxConfig, ranks: int) -> Iterator[str]:
        """One rank holds whole documents; several would have to share them."""
        if ranks > 1:
            yield (
                f"--dataloader-inter-document-masking with --context-parallel-size {ranks} is not done by --attention "
                f"{self.name}: use --context-parallel-size 1, or --attention dense."
            )

    def build_documents(self, config: ParallaxConfig, query: Tensor, key: Tensor, place: Place) -> PlacedDocuments:
        return PlacedDocuments(config.kernels, place.scale, place.number)

    def check_installed(self, config: ParallaxConfig, inputs: RowKind, place: Place) -> None:
        from megatron_lighthouse.parallax.implementations import implementation_for

        implementation_for(config.kernels, inputs.device, inputs.dtype, inputs.dim)

    def sent(
        self, config: ParallaxConfig, seq_length: int, shape: Shape, layout: Layout, comm_type: str, around: Any = None
    ) -> dict[str, tuple[int, int]]:
        """As dense attention's, and for the mean of the keys two sums in float64; by heads, r goes with the queries."""
        forward, backward = attend_bytes(comm_type, seq_length, shape, layout)
        if comm_type == "a2a":
            r = seq_length // layout.size * shape.batch * shape.heads * shape.dim * shape.itemsize
            more = r * (layout.size - 1) // layout.size
            forward, backward = forward + more, backward + more
        centre = 2 * 2 * shape.batch * shape.groups * shape.dim * FLOAT64 * (layout.size - 1)
        return {"attend": (forward, backward), "centre": (centre, 0)}

    def rows_sent(
        self, config: Any, rows: int, shape: Shape, layout: Layout, comm_type: str, past_alone: bool = False
    ) -> dict[str, tuple[int, int]]:
        sent = self.sent(config, rows, shape, layout, comm_type)
        if past_alone:  # then keys are not centred: see `Layer`
            del sent["centre"]
        return sent


def _layer(config: ParallaxConfig, query: Tensor, key: Tensor, place: Place) -> Layer:
    from megatron_lighthouse.parallax.layer import build

    kernels, past_alone = config.kernels, place.past_alone
    return build(query, key, place.exchange, place.comm_type, place.scale, kernels=kernels, past_alone=past_alone)


PARALLAX = Parallax()
