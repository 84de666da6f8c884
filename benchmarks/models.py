"""`python benchmarks/models.py --out FOLDER`: one layer of the models that people train, on one GPU, beside dense attention.

DeepSeek's shape (keys of 192 channels, values of 128) with 16 heads and with 128, which share selections and not; gpt-oss's
with sinks, by FlashAttention 4 and 3 too where they are there; Qwen3's. Forward and backward, at 98K tokens, bf16; scoring
and selecting by themselves. Leaves models.csv. `--dry-run` calls each once on a CPU, tiny, and times nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from csv_tables import write_csv
from measure import median_ms
from torch import Tensor

from megatron_lighthouse import LighthouseConfig, lighthouse_attention
from megatron_lighthouse.lighthouse.attention import lighthouse_select
from megatron_lighthouse.softmax.backends import inner_attention
from megatron_lighthouse.softmax.sinks import sinks_attention


class Case(NamedTuple):
    """A layer."""

    title: str
    heads: int
    groups: int
    dim: int
    value_dim: int
    heads_per_selection: int = 1
    sinks: bool = False
    inner: str = "auto"


CASES = [
    Case("MLA, 16 heads", 16, 16, 192, 128),
    Case("MLA, 128 heads, 16 selections", 128, 128, 192, 128, 8),
    Case("MLA, 128 heads, 128 selections", 128, 128, 192, 128),
    Case("gpt-oss", 64, 8, 64, 64, sinks=True),
    Case("gpt-oss, FlashAttention 4", 64, 8, 64, 64, sinks=True, inner="fa4"),
    Case("gpt-oss, FlashAttention 3", 64, 8, 64, 64, sinks=True, inner="fa3"),
    Case("gpt-oss, no sinks", 64, 8, 64, 64),
    Case("Qwen3", 32, 8, 128, 128),
]
TOKENS, TINY = 98304, 256


def config_of(case: Case, tokens: int) -> LighthouseConfig:
    return LighthouseConfig.for_length(tokens, heads_per_selection=case.heads_per_selection, inner=case.inner)


def inputs_of(case: Case, tokens: int, device: str) -> list[Tensor]:
    """q, k, v, and sinks where there are: bf16, with gradients."""
    how: dict[str, Any] = {"device": device, "dtype": torch.bfloat16, "requires_grad": True}
    shapes = ((case.heads, case.dim), (case.groups, case.dim), (case.groups, case.value_dim))
    sinks = [torch.randn(case.heads, **how)] if case.sinks else []
    return [*(torch.randn(tokens, 1, heads, dim, **how) for heads, dim in shapes), *sinks]


def lighthouse(config: LighthouseConfig, query: Tensor, key: Tensor, value: Tensor, *sinks: Tensor) -> Tensor:
    return lighthouse_attention(query, key, value, config, sinks=sinks[0] if sinks else None)


def layers(case: Case, tokens: int, inputs: list[Tensor]) -> dict[str, Callable[..., Tensor]]:
    """What is timed, by name."""
    config = config_of(case, tokens)
    dense = (sinks_attention if case.sinks else inner_attention)(case.inner, inputs[0], inputs[1], None, case.value_dim)
    return {
        "lighthouse": partial(lighthouse, config),
        "score and select": lambda q, k, *_: lighthouse_select(q, k, config),
        "dense": dense,
    }


def timed(case: Case) -> list[dict[str, object]]:
    """Milliseconds of each."""
    sets, rows = [inputs_of(case, TOKENS, "cuda") for _ in range(2)], []
    grad = torch.randn(TOKENS, 1, case.heads, case.value_dim, device="cuda", dtype=torch.bfloat16)
    for what, layer in layers(case, TOKENS, sets[0]).items():
        rows.append(
            {"case": case.title, "what": what, "direction": "forward", "ms": median_ms([partial(layer, *x) for x in sets])}
        )
        if what != "score and select":
            both = [partial(torch.autograd.grad, layer(*x), x, grad, retain_graph=True) for x in sets]
            rows.append({"case": case.title, "what": what, "direction": "backward", "ms": median_ms(both)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("models"))
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    for case in CASES:
        if options.dry_run:
            inputs = inputs_of(case._replace(inner="auto"), TINY, "cpu")
            called = layers(case._replace(inner="auto"), TINY, inputs)
            print(case.title, {what: tuple(layer(*inputs).shape) for what, layer in called.items()})
            continue
        try:
            rows += timed(case)
        except ValueError as error:
            print(f"{case.title} is left out: {error}")
            continue
        print(*(f"{row['case']:40} {row['what']:18} {row['direction']:9} {row['ms']:10.3f} ms" for row in rows[-5:]), sep="\n")
    if rows:
        options.out.mkdir(parents=True, exist_ok=True)
        write_csv(options.out / "models.csv", rows)


if __name__ == "__main__":
    main()
