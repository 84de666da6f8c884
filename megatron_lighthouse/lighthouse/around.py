"""The attentions that Lighthouse gathers rows for (`--lighthouse-around`): those of the registry that offer themselves.

Gathered rows stand in the order of their last token, and each sees those up to its own: they are a shorter sequence, over which
any causal attention runs. What it reads besides queries, keys and values, its streams, goes with the queries: pooled, gathered
and dealt as further heads of theirs, so that nothing between here and the attention knows of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from megatron_lighthouse.variant import Variant

if TYPE_CHECKING:
    from torch import Tensor


class Around(Mapping[str, Variant]):
    """By the names that they offer themselves by."""

    def __getitem__(self, name: str) -> Variant:
        return self._offered()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._offered())

    def __len__(self) -> int:
        return len(self._offered())

    def _offered(self) -> dict[str, Variant]:
        from megatron_lighthouse.variants import VARIANTS  # which lists Lighthouse too

        return {variant.around: variant for variant in VARIANTS.values() if variant.around is not None}


AROUND = Around()


def stacked(query: Tensor, streams: Sequence[Tensor], groups: int) -> Tensor:
    """Queries and streams, [N, B, H, D] each, as queries of more heads [N, B, (1 + streams) * H, D]: group by group."""
    import torch

    if not streams:
        return query
    return torch.cat([x.unflatten(2, (groups, -1)) for x in (query, *streams)], 3).flatten(2, 3)


def apart(rows: Tensor, streams: int, groups: int) -> tuple[Tensor, ...]:
    """The way back from `stacked`."""
    if not streams:
        return (rows,)
    return tuple(x.flatten(2, 3) for x in rows.unflatten(2, (groups, 1 + streams, -1)).unbind(3))


def streams_problem(name: str, query: Tensor, streams: Sequence[Tensor]) -> str | None:
    """Why these are not the streams of the attention `name`; None where they are."""
    wanted = [stream.name for stream in AROUND[name].streams]
    if len(streams) != len(wanted):
        reads = f"reads {len(wanted)} ({', '.join(wanted)})" if wanted else "reads none"
        return f"streams: config.around {name} {reads} besides query, key and value, got {len(streams)}: pass as many."
    for stream, x in zip(wanted, streams, strict=True):
        if x.shape != query.shape or (x.dtype, x.device) != (query.dtype, query.device):
            return (
                f"streams: {stream} of config.around {name} must be like the query, {tuple(query.shape)} {query.dtype} on "
                f"{query.device}, got {tuple(x.shape)} {x.dtype} on {x.device}."
            )
    return None
