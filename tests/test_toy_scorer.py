"""A scorer is added by the checklist of docs/extend.md, and the suite's own tests take it up."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lighthouse import lighthouse_attention, lighthouse_select
from megatron_lighthouse.lighthouse import reference, scorers
from megatron_lighthouse.lighthouse.scorers import SCORERS
from megatron_lighthouse.mcore.command_line import settings
from tests import scorer_oracle, test_scorers
from tests.oracle import Problem
from tests.steps import tensors
from tests.toy_scorer import Greatest, greatest_oracle

ROOT = Path(__file__).parents[1]
NAME = Greatest.name


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorers, "SCORERS", SCORERS)
    monkeypatch.setitem(SCORERS, NAME, Greatest())  # taken out again
    del SCORERS[NAME]
    scorers.register(Greatest())
    monkeypatch.setitem(scorer_oracle.ORACLES, NAME, greatest_oracle)


def taken_up() -> Iterator[tuple[Callable[..., None], dict[str, Any]]]:
    """The tests of test_scorers that go over SCORERS, with each value of their other parameters."""
    for test in vars(test_scorers).values():
        marks = [mark.args for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
        if any(values is SCORERS for _, values in marks):
            names = [name for name, values in marks if values is not SCORERS]
            for chosen in product(*(values for _, values in marks if values is not SCORERS)):
                plain = [
                    value for some in chosen for value in getattr(some, "values", [some])
                ]  # of a pytest.param, its one value
                yield test, {"scorer": NAME, **dict(zip(names, plain, strict=True))}


@pytest.mark.usefixtures("registered")
def test_the_tests_of_scorers_take_it_up(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = set()
    for test, given in taken_up():
        with monkeypatch.context() as patch:
            needs = {"monkeypatch": patch} if "monkeypatch" in inspect.signature(test).parameters else {}
            if test.__name__ == "test_how_a_scorer_grows_is_what_the_docs_say":  # which a toy is not in
                with pytest.raises(ValueError, match="not enough values to unpack"):
                    test(**given)
            else:
                test(**given, **needs)
        ran.add(test.__name__)
    assert len(ran) == 7


@pytest.mark.usefixtures("registered")
def test_it_runs_by_its_name_on_the_command_line() -> None:
    parser = settings.add_arguments(argparse.ArgumentParser())
    words = "--lighthouse-levels 3 --lighthouse-pooling 2 --lighthouse-budget 8 --lighthouse-tile-budget 4"
    config = settings.settings_from(parser.parse_args([*words.split(), "--lighthouse-scorer", NAME])).config
    problem = Problem(96, 3, 2, 8, 4, batch=2, groups=2, queries_per_group=3, dim=8)
    query, key, value = (x.requires_grad_() for x in tensors(problem))
    lighthouse_attention(query, key, value, config).sum().backward()
    assert query.grad is not None
    assert query.grad.abs().sum() > 0
    scores = scorer_oracle.oracle(NAME, *(x.detach().cpu().numpy() for x in (query, key, value)), problem)
    selected = reference.select(torch.from_numpy(scores), config.geometry(96), config.pin_first)
    assert torch.equal(lighthouse_select(query, key, config).cpu(), selected.indices)
    assert not torch.equal(lighthouse_select(query, key, config.replace(scorer="norm")).cpu(), selected.indices)


@pytest.mark.usefixtures("registered")
def test_a_name_is_given_once() -> None:
    with pytest.raises(ValueError, match=f"scorer {NAME!r} is there already"):
        scorers.register(Greatest())


def test_what_the_checklists_name_is_there() -> None:
    """Files, and the words that a file is said to hold: `word` in `file`."""
    text = (ROOT / "docs" / "extend.md").read_text()
    files = set(re.findall(r"`([\w./-]+/[\w.-]*)`", text))
    assert len(files) > 10
    assert [name for name in sorted(files) if "NAME" not in name and not (ROOT / name).exists()] == []
    for word, file in re.findall(r"`(\w+)` (?:in|of) `([\w./-]+\.\w+)`", text):
        assert word in (ROOT / file).read_text(), f"{word} in {file}"
