"""`python -m experiments.capture --model FILE --out FOLDER`: which scorer finds the windows that attention looks at.

Of a small model with normed queries and keys (`small_model`), trained with dense attention: the share of a query's far
attention (64 tokens and more) that falls on the best quarter of each tile's coarsest windows by s^K of a scorer, averaged over
queries, heads and rows of text. The oracle takes the best quarter by that share itself, `earliest` what stands first.
`capture.csv`, of scorers, is of the text `test`; `choice.csv`, of what `mass` could have been, of the text `choice`.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.small_model import DIM, LAYERS, TOKENS, Model, loss, rotary, rows, text, trained
from megatron_lighthouse import LighthouseConfig, lighthouse_attention
from megatron_lighthouse.lighthouse import reference
from megatron_lighthouse.lighthouse.geometry import Tiled
from megatron_lighthouse.lighthouse.scorers import SCORERS
from megatron_lighthouse.lighthouse.scorers.mass import tile_means
from megatron_lighthouse.lighthouse.scorers.summary import coarsest
from megatron_lighthouse.versions import environment

FAR, LEVELS, POOLING, SHARE = 64, 3, 4, 4
WINDOW = POOLING ** (LEVELS - 1)
WINDOWS = TOKENS // WINDOW
TILES = (1, 2, 4, 8)
NAMES = ("mass", "dilated", "summary", "norm")
TURN = rotary()

type Inputs = tuple[Tensor, Tensor, Tensor]


def far_shares(query: Tensor, key: Tensor) -> Tensor:
    """[B, G, windows]: the share of a query's far attention that each coarsest window has, a mean over queries and heads."""
    position = torch.arange(len(query))
    logits = torch.einsum("nbgrd,mbgd->bgrnm", query.unflatten(2, (key.shape[2], -1)), key) / DIM**0.5
    weights = logits.masked_fill_(position > position.unsqueeze(1), -torch.inf).softmax(-1)
    weights *= position.unsqueeze(1) - position >= FAR
    shares = weights[..., FAR:, :] / weights[..., FAR:, :].sum(-1, keepdim=True)
    return shares.unflatten(-1, (-1, WINDOW)).sum(-1).mean((2, 3))


def captured(shares: Tensor, scores: Tensor, tiles: int) -> float:
    """What the best quarter of each tile by `scores` has of `shares`, both [B, G, windows]."""
    by_tile, found = scores.unflatten(-1, (tiles, -1)), shares.unflatten(-1, (tiles, -1))
    best = by_tile.sort(dim=-1, descending=True, stable=True).indices[..., : by_tile.shape[-1] // SHARE]
    return found.gather(-1, best).sum((-1, -2)).mean().item()


def of_scorers(layers: list[Inputs]) -> Iterator[dict[str, Any]]:
    """A row a scorer and number of tiles, with the share of each layer."""
    shares = [far_shares(query, key) for query, key, _ in layers]
    for tiles in TILES:
        pyramid = Tiled(TOKENS, LEVELS, POOLING, WINDOWS // tiles)
        scores = {"oracle": shares, "earliest": [-torch.arange(WINDOWS).expand_as(x) for x in shares]}
        for name in NAMES:
            scores[name] = [SCORERS[name](*inputs, pyramid, reference, None, TURN)[1, ..., -WINDOWS:] for inputs in layers]
        for name, each in scores.items():
            found = [captured(x, score, tiles) for x, score in zip(shares, each, strict=True)]
            yield {"tiles": tiles, "scorer": name, **_by_layer(found)}


def of_choices(layers: list[Inputs]) -> Iterator[dict[str, Any]]:
    """A row a way to rank by queries, with how unlike dense attention's a layer's output is: 1 - cos²."""
    for tiles in TILES[:2]:
        found: dict[tuple[str, str], list[float]] = {}
        for inputs in layers:
            dense = _dense(*inputs)
            for name, scores in _alternatives(*inputs, tiles):
                out = _selected(inputs, scores, tiles)
                cosine = (out * dense).sum() / (out.norm() * dense.norm())
                found.setdefault(name, []).append(1 - cosine.item() ** 2)
        for (top, finer), values in found.items():
            yield {"tiles": tiles, "coarsest": top, "finer": finer, **_by_layer(values)}


def _alternatives(query: Tensor, key: Tensor, value: Tensor, tiles: int) -> Iterator[tuple[tuple[str, str], Tensor]]:
    """Names of s^Q at the coarsest and at finer levels, and scores; s^K is that of `mass`."""
    pyramid, groups = Tiled(TOKENS, LEVELS, POOLING, WINDOWS // tiles), key.shape[2]
    pooled, keys, _ = coarsest(query, key, value, pyramid, reference, TURN)
    logits = torch.einsum("nbgrd,mbgd->bgrnm", pooled.unflatten(2, (groups, -1)), keys) / DIM**0.5
    weights = logits.masked_fill_(torch.ones(WINDOWS, WINDOWS).triu().bool(), -torch.inf).softmax(-1).nan_to_num()
    entropy = -(weights * weights.clamp_min(1e-30).log()).sum(-1).sum(2)
    uniform = torch.arange(WINDOWS).clamp_min(1).log() * pooled.shape[2] // groups
    random = torch.rand(2, TOKENS, generator=torch.Generator().manual_seed(1))
    tops = {
        "greatest weight": weights.amax(-1).sum(2),
        "sum of squares": weights.square().sum(-1).sum(2),
        "negative entropy": 100 - entropy,
        "entropy below uniform": 100 + uniform - entropy,
        "random": random[0, :WINDOWS].expand(query.shape[1], groups, -1),
    }
    mass = SCORERS["mass"](query, key, value, pyramid, reference, None, TURN)
    mean = tile_means(keys, groups, pyramid.tile).repeat_interleave(TOKENS // tiles, 0)
    product = 100 + (query.unflatten(2, (groups, -1)).sum(3) * mean).sum(-1).permute(1, 2, 0)
    finer = {
        "distance from the window's mean": mass[0, ..., :-WINDOWS],
        "product with the tile's mean key": product.unflatten(-1, (-1, POOLING)).amax(-1),
        "random": random[1, : TOKENS // POOLING].expand(query.shape[1], groups, -1),
    }
    for top in tops:
        for fine in finer if top == "greatest weight" else [*finer][:1]:
            yield (top, fine), torch.stack([torch.cat([finer[fine], tops[top]], -1), mass[1]])


def _selected(inputs: Inputs, scores: Tensor, tiles: int) -> Tensor:
    """The layer with a selection by `scores`."""
    config = LighthouseConfig(LEVELS, POOLING, WINDOWS // SHARE, WINDOWS // SHARE // tiles)
    selection = reference.select(scores, config.geometry(TOKENS), True)
    return lighthouse_attention(*inputs, config, selection=selection, rotary=TURN)


def _dense(*inputs: Tensor) -> Tensor:
    query, key, value = (x.permute(1, 2, 0, 3) for x in inputs)
    rows = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return rows.permute(2, 0, 1, 3)


def _by_layer(values: list[float]) -> dict[str, str]:
    named = {f"layer {i + 1}": f"{value:.3f}" for i, value in enumerate(values)}
    return {**named, "mean": f"{sum(values) / LAYERS:.3f}"}


def write(path: Path, found: list[dict[str, Any]]) -> None:
    """A table, also printed."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    print(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="its weights; trained and left there where there are none")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "capture")
    parser.add_argument("--steps", type=int, default=600, help="of training, a row each")
    parser.add_argument("--rows", type=int, default=8, help="rows of text to measure on")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.model.is_file():
        model = Model()
        model.load_state_dict(torch.load(options.model))
    else:
        model = trained(options.steps, 1, 0)
        torch.save(model.state_dict(), options.model)
    options.out.mkdir(parents=True, exist_ok=True)
    losses = {}
    with torch.no_grad():
        for part, table, made in (("test", "capture", of_scorers), ("choice", "choice", of_choices)):
            drawn = rows(text(part), options.rows, torch.Generator().manual_seed(5))
            losses[part] = round(loss(model, drawn).item(), 3)
            write(options.out / f"{table}.csv", list(made(model.layers(drawn[:-1]))))
    facts = {"loss": losses, "rows": options.rows, **environment()}
    (options.out / "capture.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
