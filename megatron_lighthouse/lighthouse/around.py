"""The attentions that Lighthouse can gather rows for (`--lighthouse-around`): the registered ones with an `around` name.

Gathered rows stand in the order of their last token, and each row sees those up to itself. So they are a shorter sequence, and
any causal attention can run over it. What it reads besides queries, keys and values are its streams. These are pooled and
gathered as further heads of the queries, unless the attention overrides `rows.TakesRows.gather`. No other file of Lighthouse
knows which attention it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from megatron_lighthouse.variant import Variant


class Around(Mapping[str, Variant]):
    """By their `around` names."""

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
