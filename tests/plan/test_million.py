"""The plan's memory, held to the runs of benchmarks/million.py on one H200; and what the docs say of tiles to them."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from megatron_lighthouse.lighthouse.config import LighthouseConfig
from megatron_lighthouse.plan import memory
from megatron_lighthouse.plan.device import DEVICES
from megatron_lighthouse.plan.model import GPT
from megatron_lighthouse.plan.run import Run

ROOT = Path(__file__).parents[2]
with (ROOT / "benchmarks/results/million/million.csv").open() as file:
    ROWS = {row["name"]: row for row in csv.DictReader(file) if row["status"] == "trained"}
SIZES = {"0.6b": (1024, 3072, 16), "8b": (4096, 12288, 32)}
WITHIN = 0.03


@pytest.mark.parametrize("name", ROWS)
def test_memory_is_as_counted(name: str) -> None:
    row = ROWS[name]
    hidden, ffn, heads = SIZES[row["model"]]
    model = GPT(int(row["layers"]), hidden, ffn, heads, 8, 128, 151936, 0, 0, tied=row["model"] == "0.6b")
    given = {"levels": int(row["levels"]), "budget": int(row["budget"])} if int(row["budget"]) else {}
    run = Run(
        model,
        int(row["length"]),
        device=DEVICES["h200"],
        attention=row["attention"],
        config=LighthouseConfig.for_length(int(row["length"]), scorer="mass", **given),
        recompute="full",
        loss_tile_tokens=None if row["loss_tiles"] == "True" else 0,
        mlp_tile_tokens=int(row["mlp_tiles"]),
        options={"qk_layernorm": True},
    )
    assert memory.total(run.check()) / 2**30 == pytest.approx(float(row["peak GiB allocated"]), rel=WITHIN)


def test_the_docs_say_what_tiles_cost() -> None:
    whole, tiled = ROWS["tiling-32768-none"], ROWS["tiling-32768-loss"]
    gib = [f"{float(row['peak GiB allocated']):.1f}" for row in (tiled, whole)]
    seconds = [f"{float(row['seconds a step']):.3f} s" for row in (tiled, whole)]
    page = " ".join((ROOT / "docs/usage.md").read_text().split())
    assert f"{gib[0]} GiB for {gib[1]}, and {seconds[0]} for {seconds[1]}" in page
