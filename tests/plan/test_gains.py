"""The table of docs/models.md is what the plan says, and its recipes start."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lighthouse.launch import check
from megatron_lighthouse.plan import memory, time
from megatron_lighthouse.plan.__main__ import main
from megatron_lighthouse.plan.calibration import coefficients
from megatron_lighthouse.plan.device import DEVICES
from megatron_lighthouse.plan.models import models
from megatron_lighthouse.plan.run import run_of
from megatron_lighthouse.plan.words import recipe_words
from tests.launch.scripts import TOKENIZER

ROOT = Path(__file__).parents[2]


def test_the_page_holds_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    table, page = capsys.readouterr().out, (ROOT / "docs/models.md").read_text()
    assert table in page, "run python -m megatron_lighthouse.plan models, and put its table into docs/models.md"
    assert "**Predicted**" in page
    rows = [line.split(" | ") for line in table.splitlines()[2:]]
    assert {row[0].strip("| ") for row in rows} == {one["title"] for one in models().values()}
    assert all("not counted: `--" in row[-1] or float(row[3].strip("×")) >= 1 for row in rows)


def test_the_page_holds_a_million_tokens_part_by_part() -> None:
    page = (ROOT / "docs/models.md").read_text()
    run, speed = run_of("qwen3-8b-1m-8gpu", device=DEVICES["h200"]), coefficients()
    of = {"linear layers": ["linear layers"], "elementwise": ["elementwise"], "logits and loss, in tiles": ["logits and loss"]}
    of["attention"] = ["score", "select", "gather", "scatter", "inner attention", "dense attention"]
    cells: dict[str, list[str]] = {name: [] for name in (*of, "exchange, host, optimizer", "all", "GiB of a GPU")}
    for one in (run, run.change(attention="dense")):
        parts = time.step_parts(one, speed)
        taken = {name: sum(parts.pop(part, 0.0) for part in names) for name, names in of.items()}
        taken["exchange, host, optimizer"] = sum(parts.values())
        for name, seconds in taken.items():
            cells[name].append(f"{seconds:.2f}")
        cells["all"].append(f"{sum(taken.values()):.1f}")
        cells["GiB of a GPU"].append(f"{memory.total(one) / 2**30:.1f}")
    for name, found in cells.items():
        assert f"| {name} | {' | '.join(found)} |" in page


@pytest.mark.parametrize("recipe", ["llama3-8b-128k", "qwen3-8b-256k", "qwen3-8b-1m-8gpu"])
def test_recipes_of_one_node_start(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*recipe_words(ROOT / "launch/recipes" / f"{recipe}.args"), *TOKENIZER]
    node = ["--nodes", "1", "--gpus-per-node", "8", "--arch", "hopper", "--device", "h200"]
    assert check.main([*node, "--", *words, "--mock-data"]) == 0
    assert "TP 2 x CP 4 x PP 1 x DP 1" in (out := capsys.readouterr().out)
    assert "RUN OUT" not in out
