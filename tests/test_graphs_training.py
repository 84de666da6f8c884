"""`benchmarks/graphs_training.py`: what it compares. What it trains under graphs needs a GPU."""

from __future__ import annotations

import argparse
import importlib
import math
from pathlib import Path
from typing import Any

import numpy
import pytest

from megatron_lighthouse.mcore.command_line import flags, graphs, kept
from megatron_lighthouse.mcore.command_line.entry import with_all_arguments

BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("graphs_training")


def test_a_missing_step_is_far(script: Any) -> None:
    one = (numpy.array([1, 2, 3]), numpy.array([3.0, 2.0, 1.0]))
    assert script.distance(one, (one[0][1:], one[1][1:])) == 0
    assert script.distance(one, (one[0], one[1] + [0.0, 0.5, 0.25])) == 0.5
    assert script.distance(one, (numpy.array([4]), one[1][:1])) == math.inf
    assert script.distance(one, (one[0][:0], one[1][:0])) == math.inf


def test_runs_are_alike_but_for_their_graphs(script: Any, tmp_path: Path) -> None:
    options = argparse.Namespace(out=tmp_path, ranks=1, warmup=6, tiny=False, rounded=False)
    words = {kind: script.Run(kind).command(options)[3:] for kind in script.KINDS}
    folders = {kind: str(script.Run(kind).folder(options)) for kind in script.KINDS}
    for kind, command in words.items():
        graphed = script.KINDS[kind].split()
        same = [word.replace(folders[kind], folders["eager"]) for word in command if word not in graphed]
        assert same == words["eager"]
        args = flags.parse(command, with_all_arguments, strict=False)[0]
        assert not [*graphs.problems(args)]
        assert args.lighthouse_dense_warmup_iters == 6
        assert args.eval_interval < 6 < script.SAVED < args.lighthouse_stage2_at < args.train_iters == script.STEPS
    further = script.Run("full_iteration", "eager")
    assert not further.may_start(options)
    checkpoints = script.Run("eager").folder(options) / "checkpoints"
    assert kept.value(further.command(options), "--load") == str(checkpoints)
    checkpoints.mkdir(parents=True)
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("15")
    assert further.may_start(options)
