"""The runs of 'second': rows at their window's end, no dense layers, a causal selection. Ours."""

from __future__ import annotations

from dataclasses import replace

from experiments.run import Run, with_second_seed

TITLE = "rows at their window's end, no dense layers, a causal selection; several share a GPU"
EDGES = "no dense layers: at either end two with"
CAUSAL, NORMED = "--lighthouse-causal-selection", "--qk-layernorm"
REPEATED = ("norm-60", "edge-2k", "causal")
"""Any of which may be the best: what is trained again, seed and all, says how far apart two runs of one setting end."""


def runs(dense: tuple[str, Run], base: tuple[str, Run]) -> dict[str, Run]:
    """Six with either of two seeds, and others with one.

    Args:
        dense, base: what the others are compared with, by name.
    """
    variant = replace(base[1], against=(dense[0], base[0]))

    def of(title: str, options: str = "", **more: object) -> Run:
        return replace(variant, title=title, options=options, **more)  # type: ignore[arg-type]

    first = {
        dense[0]: dense[1],
        base[0]: replace(base[1], hindsight=True),
        "mean": of("rows at the mean of their positions", "--lighthouse-rope mean", hindsight=True),
        "three-levels": of("three levels, half the budget", levels=3, budget=64, tile_budget=64),
        "edge-2k": of(f"{EDGES} twice the budget", edges=2),
        "causal": of("a causal selection", CAUSAL, hindsight=True),
    }
    return {
        **first,
        **{f"{name}-2": with_second_seed(run) for name, run in first.items()},
        **{
            f"{name}-again": replace(first[name], title=f"{first[name].title}, again", against=(dense[0], name))
            for name in REPEATED
        },
        # 1.25 times the rows, of 16,384 bytes
        "causal-wide": of(
            "a causal selection of seven fourths the budget",
            f"{CAUSAL} --lighthouse-budget 896 --lighthouse-tile-budget 112",
            hindsight=True,
        ),
        "edge-k": of(f"{EDGES} as much budget", edges=1),
        "edge-4k": of(f"{EDGES} four times the budget", edges=4),
        "causal-edge-2k": of(f"causal, {EDGES} twice the budget", CAUSAL, edges=2, hindsight=True),
        "normed": replace(dense[1], title="dense, queries and keys normed", model=NORMED, against=(dense[0],)),
        "normed-mass": of("these, and scorer mass", scorer="mass", model=NORMED, against=("normed", base[0])),
    }
