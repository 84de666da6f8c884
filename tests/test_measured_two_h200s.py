"""What docs/measured_h200.md says of two GPUs, held to the files that it links."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron_lighthouse.plan.accuracy import predicted
from megatron_lighthouse.plan.calibration import coefficients, points
from tests.test_measured_h200 import PAGE, ms
from tests.test_performance import rows_of, tables


def rings() -> list[list[str]]:
    return [
        [
            f"{row['what']}, {int(row['tokens']):,}",
            *(ms(float(row[f"fwd+bwd_ms, {ranks}"])) for ranks in ("one rank", "all")),
            f"{float(row['efficiency']):.0%}",
        ]
        for row in rows_of("two_gpus/rings.csv")
        if not row["what"].startswith("documents")
    ]


def inner() -> list[list[str]]:
    return [
        [
            f"{row['inner']}, {int(row['tokens']):,}",
            *(ms(float(row[f"fwd+bwd_ms, {ranks}"])) for ranks in ("one rank", "all")),
            f"{float(row['efficiency']):.0%}",
        ]
        for row in rows_of("two_gpus/inner.csv")
    ]


OURS = ("eager", "graphs", "whole graphs", "documents", "TP", "TP graphs", "TP documents")
HOWS = ["dense, eager", *(f"lighthouse, {how}" for how in OURS)]


def steps() -> list[list[str]]:
    """Seconds of each step, call by call, and what the plan says."""
    found: dict[tuple[int, int, int], list[str]] = {}
    for row in rows_of("two_gpus/steps.csv"):
        kind = int(row["tokens"]), int(row["GPUs"]), HOWS.index(f"{row['attention']}, {row['how']}")
        found.setdefault(kind, []).append(f"{float(row['seconds a step']):#.3g}")
    fitted = {(32768, 1, 1), (32768, 2, 0), (32768, 2, 1)}
    known = {(p.geometry.seq_length, p.ranks, HOWS.index(p.what)): p for p in points() if p.kind == "h200"}
    return [
        [
            f"{kind[0]:,}, {kind[1]}",
            HOWS[kind[2]].removesuffix(", eager").removeprefix("lighthouse, "),
            f"{', '.join(found[kind])} s",
            f"{predicted(known[kind], coefficients()):#.3g} s{', fitted' * (kind in fitted)}" if kind in known else "",
        ]
        for kind in sorted(found)
    ]


def flash_blocks() -> list[list[str]]:
    found: dict[str, list[str]] = {}
    for row in rows_of("flash_blocks/flash_blocks.csv"):
        found.setdefault(f"{int(row['rows']):,}, {row['groups']}", []).append(ms(float(row["both_ms"])))
    return [[title, *times] for title, times in found.items()]


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        pytest.param(7, rings, id="layers"),
        pytest.param(8, inner, id="by what attends"),
        pytest.param(9, steps, id="steps"),
        pytest.param(10, flash_blocks, id="blocks over shards"),
    ],
)
def test_a_table_is_its_file(number: int, expected: Callable[[], list[list[str]]]) -> None:
    assert tables(PAGE)[number] == expected()


def test_documents_over_two_ranks_are_their_file() -> None:
    words = " ".join(PAGE.split())
    row = next(row for row in rows_of("two_gpus/documents.csv") if row["what"] == "documents, mean 8K")
    both, alone = (float(row[f"fwd+bwd_ms, {ranks}"]) for ranks in ("all", "one rank"))
    assert f"takes {both:.2f} ms at 98,304 tokens, where one rank takes {alone:.2f}" in words
    assert f"the host's time, {float(row['host ms']):.1f} ms" in words
    rings = {(row["what"], row["tokens"]): row for row in rows_of("two_gpus/rings.csv")}
    before = rings["documents, mean 8K", "98304"]
    assert f"without kernels, took {float(before['fwd+bwd_ms, all']):.1f} ms" in words
    assert abs(float(row["sent MB"]) / float(row["planned MB"]) - 1) < 0.005


def test_what_attends_over_two_ranks_is_its_files() -> None:
    words = " ".join(PAGE.split())
    times = {
        (row["inner"], row["tokens"]): [float(row[f"fwd+bwd_ms, {ranks}"]) for ranks in ("one rank", "all")]
        for row in rows_of("two_gpus/inner.csv")
    }
    saved = [
        sorted(round(100 * (1 - times["fa4", n][i] / times["cudnn", n][i])) for n in ("98304", "262144", "524288"))
        for i in (0, 1)
    ]
    assert f"{saved[0][0]} to {saved[0][-1]}% less time on one GPU" in words
    assert f"{saved[1][0]} to {saved[1][-1]}% less on two" in words
    assert {row["where torch is asked for it"] for row in rows_of("two_gpus/inner.csv") if row["inner"] == "fa4"} == {"True"}
    one, other = ([float(row[name]) for name in ("one GPU's ms", "graph ms")] for row in rows_of("graphs_cp/fa4.csv"))
    assert f"{one[0]:.2f} ms on one and {one[1]:.2f} ms on two at 98,304" in words
    assert f"{other[0]:.1f} and {other[1]:.2f} ms at 262,144" in words
    assert all(row["with other bits"] == "0" and row["replays"] == "100" for row in rows_of("graphs_cp/fa4.csv"))
    blocks = rows_of("flash_blocks/flash_blocks.csv")
    ours = {row["deterministic"]: float(row["both_ms"]) for row in blocks if (row["backend"], row["rows"]) == ("fa4", "49152")}
    slow = max(float(row["both_ms"]) for row in rows_of("flash_blocks/fa2.csv") if row["deterministic"] == "True")
    assert f"needed [{slow:.0f} ms]" in words
    assert f"shards {slow / ours['True']:.1f} times as fast" in words


def test_how_much_two_gpus_gain_is_the_file_of_steps() -> None:
    words = " ".join(PAGE.split())
    rows = {(row["call"], row["run"]): float(row["seconds a step"]) for row in rows_of("two_gpus/steps.csv")}

    def of_one(call: str, two: str, one: str) -> float:
        return rows[call, f"lighthouse {two}"] / rows["first", f"lighthouse {one}"]

    calls = [of_one(call, "32768 2gpu graphs", "32768 1gpu graphs") for call in ("first", "second")]
    assert "One call took {:.3f}, another {:.3f}: met once".format(*calls) in words
    assert f"Whole iterations took {of_one('fourth', '32768 2gpu whole graphs', '32768 1gpu whole graphs'):.3f}" in words
    long = [("first", ""), ("first", " graphs"), ("third", " graphs")]
    efficient = [1 / of_one(call, f"98304 2gpu{how}", "98304 1gpu") / 2 for call, how in long]
    assert "Eager it was {:.1%}, under graphs {:.1%} and {:.1%}".format(*efficient) in words
    tensor = of_one("fourth", "98304 2gpu TP", "98304 1gpu"), of_one("first", "98304 2gpu TP documents", "98304 1gpu documents")
    assert "TP 2 is {:.0%} efficient at 98,304 tokens, with documents {:.0%}".format(*(1 / x / 2 for x in tensor)) in words
