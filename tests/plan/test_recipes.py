"""The recipes that the plan knows are those that launch/ runs."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPES = tomllib.loads((ROOT / "megatron_lighthouse/plan/recipes.toml").read_text())


def flags_of(name: str) -> dict[str, str]:
    """The last value of each flag in a recipe of launch/, '' where it takes none."""
    lines = (ROOT / "launch/recipes" / f"{name}.args").read_text().splitlines()
    words = [word for line in lines for word in line.split("#")[0].split()]
    following = [*words[1:], ""]
    return {a: "" if b.startswith("--") else b for a, b in zip(words, following, strict=True) if a.startswith("--")}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_the_same_in_both_places(name: str) -> None:
    recipe, flags = RECIPES[name], flags_of(name)
    model, lighthouse = recipe["model"], recipe.get("lighthouse", {})
    expected = {
        **{"--num-layers": model["layers"], "--hidden-size": model["hidden"], "--ffn-hidden-size": model["ffn"]},
        **{"--num-attention-heads": model["heads"], "--kv-channels": model["head_dim"]},
        **{"--seq-length": recipe["seq_length"], "--max-position-embeddings": recipe["seq_length"]},
        **{f"--lighthouse-{key}": value for key, value in lighthouse.items()},
    }
    assert {flag: flags.get(flag) for flag in expected} == {flag: str(value) for flag, value in expected.items()}
    assert int(flags.get("--num-query-groups", model["heads"])) == model["groups"]
    for flag, key in (("tensor-model", "tensor"), ("context", "context"), ("pipeline-model", "pipeline")):
        assert int(flags.get(f"--{flag}-parallel-size", 1)) == recipe[f"{key}_parallel"]
    full = flags.get("--recompute-granularity") == "full"
    assert flags.get("--recompute-modules", "full" if full else "none") == recipe["recompute"]
    assert int(flags.get("--mlp-tile-tokens", 0)) == recipe.get("mlp_tile_tokens", 0)
    assert ("--untie-embeddings-and-output-weights" in flags) is not model.get("tied", False)
    assert {flags.get(f"--lighthouse-dense-{end}", "2") for end in ("first", "last")} == {str(model.get("dense_first", 2))}
