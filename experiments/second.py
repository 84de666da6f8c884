"""The runs of 'second': rows at their window's end, no dense layers, a causal selection. Budgets are for 16,384 bytes. Ours."""

from __future__ import annotations

from dataclasses import replace

from experiments.run import Run, with_second_seed

TITLE = "rows at their window's end, no dense layers, a causal selection; several share a GPU"
EDGES = "no dense layers: at either end two with"
CAUSAL, EDGE, NORMED = "--lighthouse-causal-selection", "--lighthouse-edge-budget", "--qk-layernorm"


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
        "edge-2k": of(f"{EDGES} twice the budget", f"{EDGE} 1024"),
        "causal": of("a causal selection", CAUSAL, hindsight=True),
    }
    return {
        **first,
        **{f"{name}-2": with_second_seed(run) for name, run in first.items()},
        "causal-again": replace(first["causal"], title="the same again", against=(*variant.against, "causal")),
        # 1.25 times the rows
        "causal-wide": of(
            "a causal selection of seven fourths the budget",
            f"{CAUSAL} --lighthouse-budget 896 --lighthouse-tile-budget 112",
            hindsight=True,
        ),
        "edge-k": of(f"{EDGES} as much budget", f"{EDGE} 512"),
        "edge-4k": of(f"{EDGES} four times the budget", f"{EDGE} 2048"),
        "causal-edge-2k": of(f"causal, {EDGES} twice the budget", f"{CAUSAL} {EDGE} 1024"),
        "normed": replace(dense[1], title="dense, queries and keys normed", model=NORMED, against=(dense[0],)),
        "normed-mass": of("these, and scorer mass", scorer="mass", model=NORMED, against=("normed", base[0])),
    }
