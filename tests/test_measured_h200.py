"""The tables of docs/measured_h200.md, held to the files that they link."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from tests.test_performance import rows_of, tables

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
PAGE = (ROOT / "docs/measured_h200.md").read_text()
PUBLISHED = 2**20 / 8 / 137
"""Tokens a second and GPU of the published dense run: eight H100s, 137 s a step."""


def ms(number: float) -> str:
    return f"{number:.0f} ms" if number >= 99.5 else f"{number:#.3g} ms"


def layers(name: str, kinds: tuple[str, ...], with_dim: bool) -> list[list[str]]:
    """Forward and backward of each kind, by length."""
    found: dict[str, dict[str, str]] = {}
    for row in rows_of(name):
        if row["direction"] == "fwd+bwd" and row["heads"] == row["groups"]:
            title = f"{int(row['tokens']):,}" + (f", {row['dim']}" if with_dim else "")
            found.setdefault(title, {})[row["what"]] = ms(float(row["ms"]))
    return [[title, *(times.get(kind, "") for kind in kinds)] for title, times in found.items()]


def documents() -> list[list[str]]:
    found: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows_of("documents/documents.csv"):
        if row["direction"] == "fwd+bwd":
            found.setdefault(row["mix"], {})[row["what"]] = row
    return [
        [mix, one["lighthouse"]["documents"], ms(ours), *map(ms, dense), f"{min(dense) / ours:.1f}×"]
        for mix, one in found.items()
        for ours, *dense in [[float(one[what]["ms"]) for what in ("lighthouse", "dense sdpa", "dense fa2")]]
    ]


def fp8_training() -> list[list[str]]:
    found = json.loads((RESULTS / "fp8/train.json").read_text())
    above = {run: f"{nats:+.4f}".replace("-", "−") if nats else "" for run, nats in found["above bf16"].items()}
    return [[run, f"{loss:.4f}", above[run]] for run, loss in found["mean of the last 50"].items()]


def models() -> list[list[str]]:
    found: dict[str, dict[str, float]] = {}
    for row in rows_of("models/models.csv"):
        times = found.setdefault(row["case"], {})
        times[row["what"]] = times.get(row["what"], 0) + float(row["ms"])
    return [
        [case, ms(times["lighthouse"]), ms(times["dense"]), f"{times['dense'] / times['lighthouse']:.1f}×"]
        for case, times in found.items()
    ]


def million() -> list[list[str]]:
    return [
        [
            f"{int(row['length']):,}",
            f"{float(row['seconds a step']):#.3g}",
            f"{int(row['tokens a second']):,}",
            f"{float(row['peak GiB allocated']):.1f} GiB",
        ]
        for row in rows_of("million/million.csv")
        if row["name"].startswith("0.6b-") and row["status"] == "trained"
    ]


def layers_of_8b() -> list[list[str]]:
    return [
        [
            f"{int(row['length']):,}, {row['attention']}",
            f"{float(row['seconds a layer']):.3g} s",
            f"{float(row['GiB a layer']):.2f} GiB",
        ]
        for row in rows_of("million/layers.csv")
    ]


KINDS = ("ours", "fla", "dense", "around")


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        pytest.param(0, lambda: layers("parallax/parallax.csv", KINDS, True), id="Parallax"),
        pytest.param(1, lambda: layers("wall/wall.csv", KINDS, False), id="Wall"),
        pytest.param(2, fp8_training, id="FP8"),
        pytest.param(3, documents, id="documents"),
        pytest.param(4, models, id="models"),
        pytest.param(5, million, id="a million tokens"),
        pytest.param(6, layers_of_8b, id="layers of 8B"),
    ],
)
def test_a_table_is_its_files(number: int, expected: object) -> None:
    assert callable(expected)
    assert tables(PAGE)[number] == expected()


def test_the_products_of_parallax_are_so_many() -> None:
    """Of half the pairs, 2 D operations each."""
    product = 32768**2 / 2 * 8 * 2 * 128 / 790e12 * 1000
    ours = [
        float(row["ms"])
        for row in rows_of("parallax/parallax.csv")
        if (row["what"], row["tokens"], row["heads"], row["dim"]) == ("ours", "32768", "8", "128")
    ]
    words = " ".join(PAGE.split())
    assert f"take {4 * product:.1f} and {15 * product:.1f} ms at 32,768 tokens" in words
    assert f"ours take {ours[0]:.1f} and {ours[1]:.1f} ms" in words


def test_the_published_run_is_so_many_times_slower() -> None:
    row = next(row for row in rows_of("million/million.csv") if row["name"] == "0.6b-1048576")
    words = " ".join(PAGE.split())
    assert f"{PUBLISHED:.0f} tokens a second and GPU: {int(row['tokens a second']) / PUBLISHED:.0f} times less" in words


def test_the_errors_of_wall_are_its_file() -> None:
    words, found = " ".join(PAGE.split()), json.loads((RESULTS / "wall/check.json").read_text())

    def worst(kind: str, *names: str, gates: tuple[str, ...] = ("g -0.000335", "g -0.1", "g -2.0")) -> float:
        cases = [case for shape, case in found["errors"].items() if shape.endswith(kind)]
        return max(case[gate][name] for case in cases for gate in gates for name in names)

    scalar = worst("scalar", "out"), worst("scalar", "dq", "dk", "dv"), worst("scalar", "dg", "dγ")
    assert "{:.2f}, {:.2f} and {:.2f}%".format(*(100 * error for error in scalar)) in words
    of_gates = worst("bfloat16", "dg"), worst("bfloat16", "dg", gates=("g -2.0",))
    assert f"most {worst('bfloat16', 'out'):.2%} of outputs, {worst('bfloat16', 'dq', 'dk', 'dv'):.2%} of grad" in words
    assert f"{of_gates[0]:.2%} of those of gates (at gates of -2, {of_gates[1]:.2%})" in words
    assert worst("float32", "out", "dq", "dk", "dv", "dg") == 1e-6
    assert found["repeats"] is True
    in_fp16 = json.loads((RESULTS / "wall/fp16.json").read_text())["errors"]
    wrong = [case[name] for case in in_fp16["H=4 G=2 K=64 V=64 float16"].values() for name in ("dq", "dk", "dg")]
    assert f"off by {min(wrong):.0f} to {max(wrong):.0f} times their norm" in words
    assert "illegal memory access" in in_fp16["H=4 G=2 K=128 V=128 float16"]


def test_the_errors_of_parallax_are_its_file() -> None:
    words, found = " ".join(PAGE.split()), json.loads((RESULTS / "parallax/errors.json").read_text())
    for mean, wording in (
        (0.0, "{:.3f}% of the output, {:.2f} times dense attention's, and {:.3f} to {:.3f}% of the"),
        (10.0, "10 spreads: {0:.3f}%, and {2:.3f} to {3:.3f}%"),
    ):
        case = found["errors"][f"D=128, r=0.3, mean {mean}"]
        ours = case["ours"]
        gradients = [100 * ours[name] for name in ("dq", "dr", "dk", "dv")]
        assert wording.format(100 * ours["out"], ours["out"] / case["dense"]["out"], min(gradients), max(gradients)) in words
    assert found["repeats"] is True


def test_bars_of_documents_and_a_call_each_are_their_files() -> None:
    words, found = " ".join(PAGE.split()), json.loads((RESULTS / "documents/documents.json").read_text())
    bars = found["bars"]
    times = {mix: bars[mix]["times as fast"] for mix in bars}
    assert [mix for mix in bars if not bars[mix]["met"]] == ["of 192 tokens"]
    assert f"the corpus is {times['corpus']:.2f} times as fast as one document" in words
    means = [f"{times[f'mean {n}K']:.1f}" for n in (4, 16, 64)]
    assert f"4K, 16K and 64K {means[0]}, {means[1]} and {means[2]} times as fast as dense" in words
    assert f"512 documents take {1 / times['of 192 tokens'] - 1:.1%} longer than dense, and 15% was the bar" in words
    assert f"were {max(found['dense errors'].values()):.2%} at most" in words
    before = {
        row["mix"]: row["ms"]
        for row in rows_of("documents/a_call_each.csv")
        if row["direction"] == "fwd+bwd" and row["what"] == "lighthouse"
    }
    each = {mix: ms(float(time)) for mix, time in before.items()}
    assert f"one document took {each['one document']}, means of 64K and 16K {each['mean 64K']} and {each['mean 16K']}" in words
    assert f"The corpus took {each['corpus']}, and 512 documents {each['of 192 tokens']}" in words


def test_the_parts_of_lighthouse_around_wall_are_their_file() -> None:
    words = " ".join(PAGE.split())
    rows = {(row["build"], row["piece"]): row for row in rows_of("wall/around_parts.csv")}

    def ms(what: str, build: str, piece: int = 4096) -> str:
        return f"{float(rows[build, str(piece)][f'{what}_ms']):.1f}"

    now, before, first = "sizes at once", "half by half", "piece by piece"
    assert f"Lighthouse around Wall takes {ms('whole', now)} ms" in words
    assert float(rows[now, "4096"]["whole_ms"]) <= 9
    assert "the bar of 9 ms is met" in words
    of = [ms(what, now) for what in ("kernels", "diagonal", "inner_stock", "halves")]
    assert f"Kernels take {of[0]} of these: {of[1]} along the diagonals, {of[2]} in stock attention, {of[3]} to fade" in words
    assert f"Size by size it took {ms('whole', before)} ms, {ms('halves', before)} of them to fade halves" in words
    wholes = ms("whole", first), ms("whole", first, 2048)
    assert f"took {wholes[0]} ms in pieces of 4,096 rows and {wholes[1]} in pieces of 2,048" in words
    took = {row["what"]: float(row["ms"]) for row in rows_of("wall/h200_30_november.csv") if row["direction"] == "fwd+bwd"}
    assert f"takes {took['ours']:.0f} ms at 98,304 tokens, dense {took['dense']:.0f}" in words


def test_the_steps_of_models_are_their_file() -> None:
    words = " ".join(PAGE.split())
    step = {(row["model"], row["attention"]): row["seconds a step"] for row in rows_of("model_steps/model_steps.csv")}
    gains = []
    for model, name in (("DeepSeek", "DeepSeek's architecture"), ("gpt-oss", "gpt-oss"), ("Qwen3", "Qwen3-8B")):
        ours, dense = float(step[model, "lighthouse"]), float(step[model, "dense"])
        gains.append(dense / ours)
        assert f"{name}: {ours:.2f} s" in words
        assert f"dense {dense:.2f} s" in words
    assert "So Lighthouse is {:.1f}, {:.1f} and {:.1f} times as fast".format(*gains) in words


def test_the_way_of_a_checkpoint_is_its_file() -> None:
    found = json.loads((RESULTS / "convert/h200.json").read_text())
    words, seconds = " ".join(PAGE.split()), found["seconds"]
    assert f"went into Megatron in {seconds['hf-to-megatron']:.0f} s and was verified in {seconds['verify']:.0f} s" in words
    assert len(found["losses"]) == 20
    assert f"a median of {statistics.median(found['iteration_ms']) / 1000:.2f} s each" in words
    assert f"came out in {seconds['megatron-to-hf']:.0f} s. transformers {found['transformers']} loaded it" in words
