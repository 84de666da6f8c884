"""First and last layers with a budget of their own: which they are, what is refused, and what is built."""

from __future__ import annotations

import argparse
from dataclasses import replace

import pytest

from megatron_lighthouse.launch import check
from megatron_lighthouse.launch.sizes import sizes
from megatron_lighthouse.mcore.command_line.layers import layer_problems
from megatron_lighthouse.mcore.command_line.lengths import settings_problems
from megatron_lighthouse.mcore.command_line.settings import LighthouseSettings, add_arguments, settings_from
from megatron_lighthouse.mcore.command_line.stage import Schedule
from tests.mcore.harness import MODEL
from tests.mcore.test_spec import SETTINGS, gpt, lighthouse_layers, local_spec, transformer_config

EDGES = replace(SETTINGS, edge_budget=16)


def given(*words: str) -> LighthouseSettings:
    parser = add_arguments(argparse.ArgumentParser())
    return settings_from(parser.parse_args(["--lighthouse-budget", "8", "--lighthouse-tile-budget", "4", *words]))


def test_edge_layers_are_the_dense_ones_and_select() -> None:
    settings = given("--lighthouse-edge-budget", "16", "--lighthouse-dense-last", "1")
    assert [settings.config_of(number, 6).budget for number in range(1, 7)] == [16, 16, 8, 8, 8, 16]
    assert {settings.config_of(number, 6).tile_budget for number in range(1, 7)} == {4}
    assert settings.numbers(6) == (1, 2, 3, 4, 5, 6)
    assert not any(settings.is_dense(number, 6) for number in range(1, 7))
    assert given().edge is None
    some = replace(settings, attention_layers=(2, 3, 5, 6))
    assert [some.config_of(number, 6).budget for number in some.numbers(6)] == [16, 16, 8, 16]


def test_at_the_switch_they_become_dense_with_the_rest() -> None:
    settings = replace(EDGES, schedule=Schedule(10, 3))
    for iteration, selecting in ((10, [1, 2, 3, 4, 5, 6]), (11, [3, 4, 5, 6]), (12, [5, 6]), (13, [])):
        assert [n for n in range(1, 7) if not settings.is_dense(n, 6, iteration)] == selecting


@pytest.mark.parametrize(
    ("budget", "length", "ranks", "message"),
    [
        (64, 256, 1, "--lighthouse-edge-budget 64 refines more windows than the 16 .*: use --lighthouse-edge-budget"),
        (24, 256, 1, "multiple of 96 .budget 24 / .*--lighthouse-edge-budget"),
        (28, 21 * 256, 3, "--context-parallel-size 3 .*--lighthouse-edge-budget 28 refines into"),
    ],
)
def test_the_rules_hold_for_both_budgets(budget: int, length: int, ranks: int, message: str) -> None:
    settings = replace(EDGES, edge_budget=budget)
    found = [problem for problem in settings_problems(settings, length, ranks) if "edge-budget" in problem]
    assert len(found) == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(found[0])


@pytest.mark.parametrize("budget", [0, -4, 6])
def test_a_budget_that_cannot_be(budget: int) -> None:
    with pytest.raises(ValueError, match=rf"--lighthouse-edge-budget {budget} must be a positive multiple of .* 4: use "):
        given("--lighthouse-edge-budget", str(budget))


def test_no_edges_for_a_budget() -> None:
    (problem,) = layer_problems(0, 0, 6, 16)
    assert "--lighthouse-edge-budget 16 is of the first and last layers" in problem
    assert not [*layer_problems(0, 0, 6)]


@pytest.mark.parametrize(
    ("first", "last", "layers", "use"),
    [(2, 2, 3, (1, 1)), (2, 2, 4, (2, 1)), (1, 1, 2, (1, 0)), (9, 0, 4, (3, 0)), (0, 5, 1, (0, 0))],
)
def test_numbers_of_dense_layers_that_leave_one_are_offered(first: int, last: int, layers: int, use: tuple[int, int]) -> None:
    (problem,) = layer_problems(first, last, layers)
    assert f"use --lighthouse-dense-first {use[0]} and --lighthouse-dense-last {use[1]}, or --attention dense" in problem
    assert not [*layer_problems(*use, layers)]


def test_the_check_before_a_job() -> None:
    words = [*MODEL, "--num-layers", "6", "--attention", "lighthouse"]
    args = check.parse([*words, "--lighthouse-edge-budget", "16"])
    assert not [*sizes(args)]
    assert check.summary(args, 1).endswith(
        "256 tokens, lighthouse, 80 rows attended (L 3, k 8), 144 in the first and last layers"
    )
    assert any("--lighthouse-edge-budget 64" in text for text in sizes(check.parse([*words, "--lighthouse-edge-budget", "64"])))


@pytest.mark.usefixtures("megatron")
def test_what_is_built_and_refused() -> None:
    from megatron_lighthouse.mcore.attention.layer_specs import with_lighthouse
    from megatron_lighthouse.mcore.command_line.checks import check as check_model

    model = gpt(with_lighthouse(local_spec(), EDGES), transformer_config())
    assert lighthouse_layers(model) == [1, 2, 3, 4, 5, 6]
    budgets = [layer.self_attention.core_attention.variant_config.budget for layer in model.decoder.layers]
    assert budgets == [16, 8, 8, 8, 16, 16]
    with pytest.raises(ValueError, match="--lighthouse-edge-budget 64 refines more"):
        check_model(transformer_config(), replace(EDGES, edge_budget=64), 256)
    further = transformer_config(mtp_num_layers=1)
    with pytest.raises(ValueError, match=r"--mtp-num-layers 1 makes layers .* leave --lighthouse-edge-budget out"):
        check_model(further, EDGES, 256)
    with pytest.raises(ValueError, match=r"use --lighthouse-dense-first 1 or more"):
        check_model(further, replace(SETTINGS, dense_first=0), 256)
    check_model(further, SETTINGS, 256)
    # numbers for both ends would be 3 and 2
    with pytest.raises(ValueError, match=r"leave none of 6 layers to Lighthouse, .*: use --attention dense"):
        check_model(transformer_config(mtp_num_layers=4), replace(SETTINGS, dense_first=5, dense_last=5), 256)
