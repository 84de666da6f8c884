"""The attentions that Lighthouse gathers rows for (`--lighthouse-around`): those of the registry that offer themselves.

Gathered rows stand in the order of their last token, and each sees those up to its own: they are a shorter sequence, over which
any causal attention runs. What it reads besides queries, keys and values, its streams, goes with the queries: pooled and
gathered as further heads of theirs, unless it says otherwise (`rows.TakesRows.gather`). Nothing else of Lighthouse knows of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from megatron_lighthouse.variant import Variant


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
