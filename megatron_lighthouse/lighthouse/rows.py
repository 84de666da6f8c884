"""What an attention must offer so that Lighthouse can gather rows for it (`--lighthouse-around`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_lighthouse.context_parallel.exchange import Exchange
    from megatron_lighthouse.context_parallel.ring import Passage
    from megatron_lighthouse.lighthouse.geometry import Shape
    from megatron_lighthouse.lighthouse.rotary import Rotary
    from megatron_lighthouse.lighthouse.selection import Selection
    from megatron_lighthouse.variant import Place, Stream


class RowAttention(Protocol):
    """Causal attention over gathered rows in their order, as a variant builds it for Lighthouse.

    Over context-parallel ranks, each gives its own rows in zigzag order, and gets their output over the rows of all ranks.
    """

    def passage(self) -> Passage | None:
        """The handle of one call, where keys and values may set out to other ranks as they are gathered; None where not."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *streams: Tensor, passage: Passage | None = None) -> Tensor:
        """Rows as `Variant.gather` gives them, of this rank -> [S, B, H, D]; differentiable once."""


class TakesRows:
    """The part of a `Variant` that Lighthouse calls when it gathers rows for it."""

    name: str
    streams: tuple[Stream, ...]
    native: bool
    around: str | None = None
    """Its name in `--lighthouse-around`, where Lighthouse can gather rows for it: then it has `build_rows`."""

    def rows_problem(self, inner: str) -> str | None:
        """Why it cannot attend to gathered rows by the backend `inner` of `--lighthouse-inner`; None where it can."""
        if inner == "auto" or self.native:
            return None
        return (
            f"config.inner {inner} is of softmax attention, and config.around {self.around} has kernels of its own: use "
            f"config.inner auto, and the options --{self.name}-… to choose them."
        )

    def streams_problem(
        self, config: Any, query: Tensor, key: Tensor, streams: Sequence[Tensor], exchange: Exchange | None
    ) -> str | None:
        """Why these are not its streams in `lighthouse_attention`, where it is `around`; None where they are.

        Args:
            config: None for its defaults.
        """
        if message := number_problem(str(self.around), self.streams, streams):
            return message
        for stream, x in zip(self.streams, streams, strict=True):
            if x.shape != query.shape or (x.dtype, x.device) != (query.dtype, query.device):
                return (
                    f"streams: {stream.name} of config.around {self.around} must be like the query, {tuple(query.shape)} "
                    f"{query.dtype} on {query.device}, got {tuple(x.shape)} {x.dtype} on {x.device}."
                )
        return None

    def rotary_problem(self) -> str | None:
        """Why pooled rows cannot be turned on to their window's last token; None where they can."""
        return None

    def of_projections(self, config: Any, streams: tuple[Tensor, ...], rotary: Rotary | None = None) -> tuple[Tensor, ...]:
        """The streams that `lighthouse_attention` reads, from what the layer's projections gave.

        Args:
            rotary: what the queries and keys come rotated by.
        """
        return streams

    def gather(
        self,
        take: Callable[..., tuple[Tensor, ...]],
        selection: Selection,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *streams: Tensor,
    ) -> tuple[Tensor, ...]:
        """Rows of queries, keys, values and streams: [S, B, heads, D] each. Here streams are averaged as the queries are.

        Args:
            take: `Steps.gather` of this selection.
        """
        groups = selection.places.shape[1]
        near, rows_k, rows_v = take(stacked(query, streams, groups), key, value)
        rows_q, *others = apart(near, len(streams), groups)
        return rows_q, rows_k, rows_v, *others

    def row_bytes(self, config: Any, shape: Shape) -> int:
        """Bytes of one row of queries, keys, values and streams, as `gather` gives them."""
        queries = shape.heads * (1 + len(self.streams)) * shape.dim
        return shape.batch * shape.itemsize * (queries + shape.groups * (shape.dim + shape.values))

    def build_rows(self, inner: str, query: Tensor, key: Tensor, place: Place) -> RowAttention:
        """What attends to Lighthouse's rows, where it is `around`.

        Args:
            inner: the backend that `--lighthouse-inner` names.
            query: [S/C, B, H, D]; key: [S/C, B, G, D], this rank's rows; of these only shapes, dtype and device count.
            place: of the Lighthouse layer; `place.around` is this attention's config, None for its defaults. A call brings
                sinks, [H], behind the streams.

        Raises:
            ValueError: what it cannot do.
        """
        raise NotImplementedError

    def build_document_rows(self, inner: str, query: Tensor, key: Tensor, place: Place) -> Callable[..., Tensor]:
        """As `build_rows`, over the rows of packed documents: an `AttendDocuments`, with streams and sinks behind."""
        raise NotImplementedError


def stacked(query: Tensor, streams: Sequence[Tensor], groups: int) -> Tensor:
    """Queries and streams, [N, B, H, D] each, as queries of more heads [N, B, (1 + streams) * H, D]: group by group."""
    if not streams:
        return query
    import torch

    return torch.cat([x.unflatten(2, (groups, -1)) for x in (query, *streams)], 3).flatten(2, 3)


def apart(rows: Tensor, streams: int, groups: int) -> tuple[Tensor, ...]:
    """The way back from `stacked`."""
    if not streams:
        return (rows,)
    return tuple(x.flatten(2, 3) for x in rows.unflatten(2, (groups, 1 + streams, -1)).unbind(3))


def number_problem(name: str, wanted: Sequence[Stream], streams: Sequence[Tensor]) -> str | None:
    """Why there are too many or too few streams for the attention `name`; None where there are as many as it reads."""
    if len(streams) == len(wanted):
        return None
    reads = f"reads {len(wanted)} ({', '.join(stream.name for stream in wanted)})" if wanted else "reads none"
    return f"streams: config.around {name} {reads} besides query, key and value, got {len(streams)}: pass as many."
