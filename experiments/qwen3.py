"""The runs of 'qwen3': queries and keys normed as in Qwen3, where scores are by mass or dilated. Ours."""

from __future__ import annotations

from dataclasses import replace

from experiments.run import REFERENCE, Run, with_second_seed
from experiments.second import CAUSAL
from experiments.studies import MUON

TITLE = "a Qwen3-like model by Muon, two seeds: dense, and scorers that norms leave something; several share a GPU"
ADAM_TITLE = "the same model by Adam, as the recipe has it; several share a GPU"
BY_ADAM = """
    --num-layers 12 --hidden-size 512 --ffn-hidden-size 1600 --num-attention-heads 8 --kv-channels 64
    --group-query-attention --num-query-groups 4 --qk-layernorm --norm-epsilon 1e-6 --rotary-base 1000000
"""
"""The MLP has what 4 groups of keys and values leave of the other experiments' weights."""
GPT_39M = f"{BY_ADAM} {MUON}"
"""By Adam, 1,500 iterations end in the middle of a fall, at another place for each seed."""

_DENSE = Run("dense from scratch", against=())
_MASS = Run("60% scorer mass, then dense", 60, scorer="mass", against=(REFERENCE, "dilated"))
_CAUSAL = "dilated, a causal selection"
_FIRST = {
    REFERENCE: _DENSE,
    "mass": _MASS,
    "dilated": Run("60% scorer dilated, then dense", 60, scorer="dilated"),
    "mass-40": Run("40% scorer mass, then dense", 40, scorer="mass", against=(REFERENCE, "mass")),
    "warm": Run("25% dense, to 60% scorer mass, then dense", 60, warmup=25, scorer="mass", against=(REFERENCE, "mass")),
    # scores of mass rest on all queries of a tile, so that its selection cannot be causal
    "causal": Run(
        f"60% scorer {_CAUSAL}, then dense", 60, scorer="dilated", options=CAUSAL, hindsight=True, against=(REFERENCE, "mass")
    ),
    "causal-40": Run(
        f"40% scorer {_CAUSAL}, then dense", 40, scorer="dilated", options=CAUSAL, against=(REFERENCE, "mass", "causal")
    ),
}
_ADAM = {REFERENCE: _DENSE, "mass": replace(_MASS, against=(REFERENCE,), hindsight=True), "causal": _FIRST["causal"]}


def _two_seeds(runs: dict[str, Run]) -> dict[str, Run]:
    return {**runs, **{f"{name}-2": with_second_seed(run) for name, run in runs.items()}}


RUNS, ADAM_RUNS = _two_seeds(_FIRST), _two_seeds(_ADAM)
