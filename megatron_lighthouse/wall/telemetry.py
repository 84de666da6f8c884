"""How fast channels fade: half-lives of the gates, by layer and head. Costs nothing until a layer is watched.

Over many tokens a channel keeps exp(Σ g), so it goes by the mean of its gates: half is left after

    h = ln 2 / -mean(g)    tokens,

the mean of all tokens of an iteration, whatever document they are of. Ours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_lighthouse import running
from megatron_lighthouse.lighthouse.geometry import Shape

QUARTILES = {"p25": 0.75, "p50": 0.5, "p75": 0.25}
"""Of the half-lives of a head's channels, and which quantile of their rates each is: the longer a life, the less its rate."""

_layers: running.Watched[Tensor] = running.Watched()
watching = _layers.watching


def watched() -> dict[int, Tensor]:
    """Of each watched layer that ran in this process: [heads of gates, K + 1] float64, of all calls.

    The sums of the gates of a channel, and how many tokens these are of.
    """
    return _layers.found()


def record(gate: Tensor, gates: Callable[[Tensor], Tensor] | None = None) -> None:
    """Called with the gates of a layer's tokens, [n, B, heads, K], or with what `gates` makes them of."""
    if (number := running.current()) not in _layers.records:
        return
    with torch.no_grad():
        made = gates(gate) if gates else gate
        sums = made.sum((0, 1), dtype=torch.float64)
        tokens = sums.new_full((len(sums), 1), made.shape[0] * made.shape[1])
        found, before = torch.cat([sums, tokens], 1), _layers.records[number]
        _layers.records[number] = found if before is None else before + found


@dataclass(frozen=True)
class HalfLives:
    """By layer and head of gates: quartiles over its channels, in tokens."""

    tied: bool
    """Whether there are gates for each key/value head alone."""

    def watching(self, layers: Iterable[int]) -> AbstractContextManager[None]:
        return watching(layers)

    def sums(self, layers: Sequence[int], shape: Shape, rank: int, ranks: int) -> Tensor:
        """[layers, heads of gates, K + 1], of all micro-batches."""
        found, heads = watched(), shape.groups if self.tied else shape.heads
        device = next((sums.device for sums in found.values()), None)
        whole = torch.zeros(len(layers), heads, shape.dim + 1, dtype=torch.float64, device=device)
        for own, layer in zip(whole.chunk(ranks, 1)[rank], layers, strict=True):
            if layer in found:
                own.copy_(found[layer])
        return whole

    def scalars(self, layers: Sequence[int], sums: Tensor) -> dict[str, float]:
        """`wall/half-life/layer-N/head-M/p50`, and so on; layers count from 1, heads from 0. Infinite where nothing fades."""
        *_, tokens = sums.unbind(-1)
        rates = sums[..., :-1].abs() / tokens.unsqueeze(-1)
        lives = {name: (math.log(2) / rates.quantile(share, -1)).tolist() for name, share in QUARTILES.items()}
        return {
            f"wall/half-life/layer-{layer}/head-{head}/{name}": of_layers[i][head]
            for i, layer in enumerate(layers)
            for head in range(sums.shape[1])
            if tokens[i, head]
            for name, of_layers in lives.items()
        }

    def draw(self, scalars: dict[str, float], folder: Path, iteration: int) -> None:
        """half-life.png: the median of each layer and head, and quartiles by layer."""
        from megatron_lighthouse.wall.picture import draw

        found: dict[int, dict[int, dict[str, float]]] = {}
        for name, value in scalars.items():
            if parts := re.fullmatch(r"wall/half-life/layer-(\d+)/head-(\d+)/(p\d+)", name):
                found.setdefault(int(parts[1]), {}).setdefault(int(parts[2]), {})[parts[3]] = value
        draw(found, folder / "half-life.png", f"iteration {iteration:,}")
