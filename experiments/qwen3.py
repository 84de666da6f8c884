"""The runs of 'qwen3': queries and keys normed as in Qwen3, where scores are by mass or dilated. Ours."""

from __future__ import annotations

from experiments.run import REFERENCE, Run, with_second_seed
from experiments.studies import MUON

TITLE = "a Qwen3-like model by Muon, two seeds: dense, and scorers that norms leave something; several share a GPU"
GPT_39M = f"""
    --num-layers 12 --hidden-size 512 --ffn-hidden-size 1600 --num-attention-heads 8 --kv-channels 64
    --group-query-attention --num-query-groups 4 --qk-layernorm --norm-epsilon 1e-6 --rotary-base 1000000
    {MUON}
"""
"""By Adam, 1,500 iterations end in the middle of a fall, at another place for each seed. The MLP has what 4 groups of keys and
values leave of the other experiments' weights."""

_FIRST = {
    REFERENCE: Run("dense from scratch", against=()),
    "mass": Run("60% scorer mass, then dense", 60, scorer="mass", against=(REFERENCE, "dilated")),
    "dilated": Run("60% scorer dilated, then dense", 60, scorer="dilated"),
    "mass-40": Run("40% scorer mass, then dense", 40, scorer="mass", against=(REFERENCE, "mass")),
}
RUNS = {
    **_FIRST,
    **{f"{name}-2": with_second_seed(run) for name, run in _FIRST.items()},
}
