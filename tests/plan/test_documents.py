"""The plan of packed documents: held to the packing itself, and to one sequence where a row is one document."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from megatron_lighthouse.lighthouse.config import LighthouseConfig
from megatron_lighthouse.lighthouse.geometry import Shape
from megatron_lighthouse.lighthouse.packed.packing import Packing
from megatron_lighthouse.lighthouse.packed.sent import document_bytes
from megatron_lighthouse.lighthouse.scorers import SCORERS
from megatron_lighthouse.plan import memory, time
from megatron_lighthouse.plan.__main__ import main
from megatron_lighthouse.plan.calibration import coefficients
from megatron_lighthouse.plan.documents import FLAG, DocumentGeometry, Mix
from megatron_lighthouse.plan.run import run_of
from megatron_lighthouse.sequence.layout import Layout
from tests.context_parallel.test_documents import row_of

RINGS = Path(__file__).parents[2] / "benchmarks" / "results" / "two_gpus" / "rings.csv"
MEASURED = {
    (
        "documents, mean 8K",
        32768,
    ): "2938 1830 1430 2800 772 1088 213 2100 387 676 455 1239 1050 417 2206 1831 801 719 201 1146 8469",
    ("documents, mean 32K", 32768): "11756 7323 5724 7965",
    ("documents, mean 32K", 98304): "35271 21971 17175 23887",
}
"""Lengths that benchmarks/rings.py drew."""
N = 98304
RUN = run_of("530m-98k")
SHAPE = Shape(1, 8, 8, 128, 2)


def test_one_document_is_one_sequence() -> None:
    packed = RUN.change(documents=Mix(((N, 3),))).check()
    assert packed.geometry.gathered_length == RUN.geometry.gathered_length
    for run, other in ((packed, RUN), (packed.change(attention="dense"), RUN.change(attention="dense"))):
        assert time.step_parts(run, coefficients()) == pytest.approx(time.step_parts(other, coefficients()))
        assert memory.total(run) == memory.total(other)


@pytest.mark.parametrize(("mix", "tokens"), MEASURED)
def test_bytes_are_those_that_two_gpus_sent(mix: str, tokens: int) -> None:
    with RINGS.open() as file:
        (row,) = (row for row in csv.DictReader(file) if (row["what"], row["tokens"]) == (mix, str(tokens)))
    config = LighthouseConfig(3, 4, tokens // 64, tile_budget=tokens // 1024)
    packing = Packing.of(row_of([int(length) for length in MEASURED[mix, tokens].split()]), config.rule)
    ranks = [document_bytes("p2p", packing, SHAPE, Layout(2, rank)) for rank in range(2)]
    assert max(sum(map(sum, plan.values())) for plan in ranks) / 1e6 == pytest.approx(float(row["sent MB"]), rel=0.01)


@pytest.mark.parametrize("scorer", ["norm", "summary"])
def test_sizes_are_those_of_the_packing(scorer: str) -> None:
    lengths = [1, 700, 5000, 64, 20000, 333, 31000, 41206]
    assert sum(lengths) == N
    config = LighthouseConfig.for_length(N, scorer=scorer)
    found = DocumentGeometry.of(config, Mix(tuple((length, 1) for length in lengths)).row(N))
    packing = Packing.of(row_of(lengths), config.rule)
    assert found.gathered_length == packing.gathered_length
    assert found.tiles == packing.tiles.shape[1]
    assert [found.entries(level) for level in range(found.levels)] == [packing.entries(level) for level in range(found.levels)]
    assert found.attended**2 == pytest.approx(sum(rows**2 for rows in packing.rows.lengths))
    assert found.row.attended**2 == pytest.approx(sum(length**2 for length in lengths))
    one = SCORERS[scorer].flops(config.geometry(N), SHAPE)
    assert found.scorer_flops(scorer, SHAPE) < one if scorer == "summary" else found.scorer_flops(scorer, SHAPE) == one == 0


def test_shorter_documents_cost_dense_attention_less() -> None:
    half, whole = (
        time.step_parts(RUN.change(attention="dense", documents=Mix(((n, 5),))), coefficients()) for n in (N // 2, N)
    )
    cost = coefficients()
    start = cost.attention["dense", "fwd+bwd"][0] * RUN.model.layers * RUN.micro_batches
    assert half["dense attention"] - start == pytest.approx((whole["dense attention"] - start) / 2)
    assert {name: half[name] for name in ("linear layers", "elementwise")} == {
        name: whole[name] for name in ("linear layers", "elementwise")
    }


def test_whole_documents_are_not_gathered() -> None:
    run = RUN.change(documents=Mix(((192, 1),)), config=RUN.config.replace(whole_below=256))
    parts = time.step_parts(run, coefficients())
    assert all(parts[step] == 0 for step in ("score", "select", "gather", "scatter"))
    assert run.geometry.gathered_length == N


def test_documents_longer_than_a_row_are_cut() -> None:
    assert dict(Mix(((250, 2),)).row(100).counts) == {50: pytest.approx(0.4), 100: pytest.approx(0.8)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no length"),
        ("8192\n0\n", "line 2: '0' must be a document's tokens"),
        ("8192 2 1\n", "line 1: '8192 2 1' must be"),
        ("8k\n", "such as '8192', or '8192 17'"),
    ],
)
def test_files_that_say_no_lengths_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "lengths").write_text(text)
    with pytest.raises(ValueError, match=f"{FLAG} .*{message}"):
        Mix.read(tmp_path / "lengths")
    with pytest.raises(ValueError, match=r"cannot be read .* name a text file"):
        Mix.read(tmp_path / "none")


def test_the_answer_says_what_documents_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lengths").write_text("4096 3\n65536\n\n4096\n")
    assert main(["--recipe", "530m-98k", FLAG, str(tmp_path / "lengths")]) == 0
    assert "documents: 6.0 a row, of 16,384 tokens on average and 65,536 at most" in capsys.readouterr().out
    assert main(["--recipe", "530m-98k", "--gpus", "2", "--context-parallel-size", "2", FLAG, str(tmp_path / "lengths")]) == 2
    assert "Transformer Engine shares out documents of multiples of 4 tokens alone" in capsys.readouterr().err
