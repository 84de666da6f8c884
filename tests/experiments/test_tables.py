"""Statistics of an experiment, against what was added up by hand."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest

from experiments import pairs, summary, tables
from experiments.runs import BASE
from experiments.work import STARTED, run_row
from megatron_lighthouse.recipe.positions import mean_and_error
from megatron_lighthouse.recipe.printed_log import curve
from tests.experiments.by_hand import DENSE, OURS, asked, facts, made
from tests.tolerances import assert_close

LOG = """
 [2026-11-25 00:00:00] iteration {i:8d}/      10 | consumed samples: {i:12d} | elapsed time per iteration (ms): {ms} | \
learning rate: 1.000000E-03 | global batch size:     1 | lm loss: {loss} | loss scale: 1.0 | grad norm: 2.0 |
"""


def lines(*points: tuple[int, str, str]) -> str:
    return "".join(LOG.format(i=i, ms=ms, loss=loss) for i, ms, loss in points)


def test_a_log_that_was_taken_up_again() -> None:
    first = lines((1, "900.0", "5.000000E+00"), (2, "500.0", "4.500000E+00"), (6, "100.0", "9.000000E+00"))
    again = lines((3, "800.0", "3.500000E+00"), (4, "500.0", "3.000000E+00"), (5, "200.0", "2.000000E+00"))
    found = [(p["iteration"], p["loss"], p["seconds"]) for p in curve(first + STARTED + again, STARTED)]
    # what Megatron logs of a process's second iteration is the mean of two
    assert found == [(1, 5.0, 0.9), (2, 4.0, 0.1), (3, 3.5, 0.8), (4, 2.5, 0.2), (5, 2.0, 0.2)]


def test_a_row_by_hand() -> None:
    seconds = [9.0, 1.0, 1.0, 5.0, 2.0]
    points = [{"iteration": i + 1, "loss": 5.0 - i, "seconds": s} for i, s in enumerate(seconds)]
    row = run_row(facts(BASE, switch=3, dense_from=4), points, None)
    # three iterations, of whose second half the median is 1 second, two of whose second half it is 2
    assert (row["seconds"], row["steady_seconds"], row["tokens"], row["training_loss"]) == (18.0, 7.0, 40, 1.5)
    assert (row["tokens_per_second_lighthouse"], row["tokens_per_second_dense"]) == (8.0, 4.0)
    # 2 and 1 after a level of 3.5, the mean of 4 and 3
    assert (row["level"], row["spike"], row["iterations_to_recover"], row["held_out_loss"]) == (3.5, -1.5, 0, None)


def test_a_dense_warmup_is_a_stage_of_its_own() -> None:
    seconds = [9.0, 3.0, 1.0, 1.0, 2.0, 2.0]
    losses = [9.0, 9.0, 4.0, 3.0, 5.0, 3.0]
    points = [{"iteration": i, "loss": x, "seconds": s} for i, (x, s) in enumerate(zip(losses, seconds, strict=True), 1)]
    row = run_row(facts(BASE, switch=4, dense_from=5, warmup=2, steps=6), points, None)
    assert (row["warmup"], row["steady_seconds"], row["level"], row["spike"]) == (2, 2 * 3 + 2 * 1 + 2 * 2, 3.5, 1.5)
    assert (row["tokens_per_second_lighthouse"], row["tokens_per_second_dense"]) == (8.0, 4.0)
    assert "warmup" not in run_row(facts(BASE, switch=4, dense_from=5), points, None)


def test_pairs_by_hand(tmp_path: Path) -> None:
    pairs.write(tables.merged([DENSE, OURS]), tmp_path)
    (pair,) = tables.read_csv(tmp_path / "pairs.csv")
    # by sequence (1 + 0 + 2 * 0.5) / 4 = 0.5 and (0 + 1 + 2 * 2) / 4 = 1.25, which are 0.375 either side of their mean
    assert (pair["run"], pair["against"], pair["sequences"]) == (BASE, "dense", 2)
    assert_close(numpy.array([pair["difference"], pair["standard_error"]]), [0.875, 0.375], "float64")
    assert (pair["gap"], pair["greatest_distance_at_first"], pair["mean_distance"]) == (0.5, 1.0, 0.5)
    assert pair["iterations_to_catch_up"] is pair["dense_spike"] is None  # from no switch
    above = [row["above"] for row in tables.read_csv(tmp_path / "positions.csv") if row["run"] == BASE]
    assert above == [0.5, 0.5, 1.25]


def test_iterations_until_level_with_dense() -> None:
    """Counted from the switch; the mean of two differences is 1 in iteration 2, 0.75 and 0 in the next."""
    dense = made("dense", [], [3.0, 2.0, 1.0, 1.0])
    ours = made(BASE, [], [3.5, 3.0, 1.5, 0.5], switch=1, dense_from=2)
    found = pairs.training(tables.merged([dense, ours]), BASE, "dense")
    assert (found["iterations_to_catch_up"], found["dense_spike"]) == (3, -1.0)


def test_sequences_of_one_document_count_as_one(tmp_path: Path) -> None:
    together = [tables.merged([DENSE, OURS])]
    for row in together[0].tables["sequences"]:
        row["document"] = 7
    held_out = pairs.held_out(together[0], BASE, "dense")
    assert (held_out["documents"], held_out["difference"]) == (1, 0.875)
    assert numpy.isnan(held_out["standard_error"])
    values = numpy.array([1.0, 3.0, 2.0, 6.0])
    mean, error = mean_and_error(values, [0, 0, 1, 1])
    assert_close(numpy.array([mean, error]), [3.0, numpy.array([2.0, 4.0]).std(ddof=1) / 2**0.5], "float64")
    assert_close(mean_and_error(values, range(4))[1], mean_and_error(values)[1], "float64")


def test_answers_and_seconds_in_pairs() -> None:
    both = tables.merged([asked("dense", [1, 0, 0, 1], steady_seconds=8.0), asked(BASE, [1, 1, 0, 1], steady_seconds=6.0)])
    row = pairs.pair(both, BASE, "dense")
    assert row is not None
    assert (row["questions"], row["steady_ratio"], row["seconds_ratio"], row["same_gpu"]) == (4, 0.75, 1.0, "yes")
    # one question in four
    assert_close(numpy.array([row["noise_accuracy_difference"], row["noise_accuracy_error"]]), [0.25, 0.25], "float64")
    assert (row["noise_log_probability_difference"], row["classic_accuracy_difference"]) == (0, None)
    shared = tables.merged([asked("dense", [1], steady_seconds=8.0), asked(BASE, [1], steady_seconds=6.0, at_once=2)])
    assert set(pairs.cost(shared, BASE, "dense").values()) == {None}
    others = tables.merged([asked("dense", [1], at_once=2), asked(BASE, [1, 1], at_once=2)])
    with pytest.raises(ValueError, match="different questions: use the same --passkey-samples"):
        pairs.pair(others, BASE, "dense")


def test_of_variable_tracking_there_are_columns_where_it_was_asked() -> None:
    def both(probe: str, axis: str) -> tables.Results:
        answers = {"dense": [1, 0, 0, 1], BASE: [1, 1, 1, 1]}
        return tables.merged(asked(run, right, probe, axis, steady_seconds=8.0) for run, right in answers.items())

    row, other = (pairs.pair(both(*names), BASE, "dense") for names in (("variables", "hops"), ("passkey", "depth")))
    assert row is not None
    assert other is not None
    ours = {name: value for name, value in row.items() if name.startswith("variables_")}
    assert ours.keys() == {f"variables_{name}" for name in other if name.startswith(("questions", "noise_", "classic_"))}
    assert (ours["variables_questions"], ours["variables_noise_accuracy_difference"], row["questions"]) == (4, 0.5, None)
    assert not [name for name in other if name.startswith("variables_")]
    fillers = {"noise": {"accuracy": 0.25, "log_probability": -2.0}}
    found = run_row(facts(BASE), [], {"variables": {"fillers": fillers}})
    assert (found["variables_noise_accuracy"], found["variables_noise_log_probability"]) == (0.25, -2.0)
    assert not [name for name in run_row(facts(BASE), [], {}) if name.startswith("variables_")]


def test_runs_of_different_seeds_read_different_text() -> None:
    both = tables.merged([DENSE, made("dense-2", [], [3.0, 2.0], seed=2)])
    assert set(pairs.training(both, "dense-2", "dense").values()) == {None}
    same = tables.merged([OURS, made("norm-75", [], [3.0, 2.0, 7.0], switch=2)])
    same.facts["runs"][BASE]["switch"] = 2
    found = pairs.training(same, "norm-75", BASE)
    assert (found["distance_before_switch"], found["early_distance"], found["mean_distance"]) == (0.25, 5.5 / 3, 5.5 / 3)


def test_two_seeds_are_held_each_to_its_own_dense_run() -> None:
    """0.25 and 0.75 above: 0.5 in the mean. Nothing is said of a run with one seed, or of what is not held to dense."""

    def seeds(run: str, losses: tuple[float, ...]) -> list[tables.Results]:
        named = zip((run, f"{run}-2"), losses, strict=False)
        return [made(name, [[x, x, x]], [3.0], experiment="qwen3", seed=i + 1) for i, (name, x) in enumerate(named)]

    runs = [*seeds("dense", (1.0, 2.0)), *seeds("mass", (1.25, 2.75)), *seeds("dilated", (1.5,))]
    above = {row["run"]: row for row in reversed(pairs.pairs(tables.merged(runs)))}
    assert summary.verdict(above) == [
        "`mass` above dense, mean of two seeds: +0.5000 nats, each 0.2500 from it; the bar is +0.005.",
        "Dense with another seed: +1.0000 nats.",
    ]
    assert summary.verdict({name: {**row, "against": "dilated"} for name, row in above.items() if name != "dense-2"}) == []


def test_the_verdict_has_the_probes_too() -> None:
    """The bar is of both: right digits of two seeds, each less those of its own dense run."""
    passkey, tracking = "noise_accuracy_difference", "variables_noise_accuracy_difference"
    first = {"against": "dense", "difference": 0.01, passkey: 0.1, tracking: None}
    second = {"against": "dense-2", "difference": -0.03, passkey: -0.02, tracking: 0.5}
    assert summary.verdict({"causal-2": second, "causal": first}) == [
        "`causal` above dense, mean of two seeds: -0.0100 nats, each 0.0200 from it; the bar is +0.005. "
        "Passkey: +4.0%, each 6.0% from it; the bar is 0."
    ]
    (said,) = summary.verdict({"causal-2": second, "causal": {**first, tracking: 0.25}})
    assert said.endswith(" Variable tracking: +37.5%, each 12.5% from it.")


def test_what_the_later_folder_knows_counts() -> None:
    later = made("dense", [[0.0, 0.0, 0.0]], [1.0])
    both = tables.merged([DENSE, OURS, later])
    assert both.losses("dense") == {1: 1.0}
    assert [row["run"] for row in both.tables["sequences"]] == ["dense", BASE, BASE]
    with pytest.raises(ValueError, match="different sequences"):
        pairs.pairs(both)
    with pytest.raises(ValueError, match=r"different steps \(5, 7\) do not compare"):
        tables.merged([DENSE, made(BASE, [], [], steps=7)])
