"""What benchmarks/session.py is to train on GPUs can start there, as far as Megatron's parser and rules and our own tell."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import pytest

from experiments.commands import Commands
from experiments.runs import EXPERIMENTS, Size
from megatron_lighthouse.launch import check
from megatron_lighthouse.recipe.presets import default_text
from tests.mcore.harness import ROOT, without

sys.path.append(str(ROOT / "benchmarks"))

import graphs_training
import layouts
import training_agreement
import training_step
import two_gpus
from session_cases import CASES, SECOND

THERE = "--distributed-backend nccl --bf16 --transformer-impl transformer_engine --attention-backend fused"
"""What `experiments.machine.implementation` answers on an H200 with Transformer Engine and without Apex."""
Lines = dict[str, tuple[int, list[str]]]
"""GPUs and command of each run."""
OUT = Path("out")


def of_two_gpus() -> Lines:
    runs = [run for lane in (*two_gpus.ALONE, two_gpus.TOGETHER) for run in lane]
    return {f"two_gpus, {run.name}": (run.gpus, run.command(OUT, tiny=False)) for run in runs}


def of_layouts() -> Lines:
    """Without the data that the script writes first."""
    found = {}
    for run in (run for runs in layouts.RUNS.values() for run in runs):
        words = run.command(OUT, tiny=False)
        found[run.name] = run.gpus, words if run.text else [*without(words, "--data-path"), "--mock-data"]
    return found


def of_losses() -> Lines:
    """Of every layout, but for the checkpoint that all start from."""
    alike = training_agreement.Comparison("layouts", training_agreement.TE, [])
    found = {}
    for name, (gpus, words) in training_agreement.LAYOUTS.items():
        run = training_agreement.Run(name, gpus, tuple(words.split()))
        found[f"losses, {name}"] = gpus, training_agreement.command(alike, run, OUT, ["--train-iters", "20"], tiny=0)
    return found


def of_graphs() -> Lines:
    options = argparse.Namespace(out=OUT, ranks=1, tiny=False, rounded=False, warmup=0)
    return {f"graphs, {kind}": (1, graphs_training.Run(kind).command(options)) for kind in graphs_training.KINDS}


def of_steps() -> Lines:
    found = {}
    for case in (case for case in CASES if "training_step.py" in case.words):
        words = shlex.split(case.words)
        more = words[words.index("--runs") + 2 :]
        options = argparse.Namespace(out=OUT, ranks=1, seq_length=32768, layers=30, budget=512, steps=10)
        found[case.name] = (1, training_step.command(training_step.RUNS[words[words.index("--runs") + 1]], options, more))
    return found


def of_experiments() -> Lines:
    found = {}
    runs = {"second": " ".join(SECOND.values()), "qwen3-adam": "mass mass-2 causal"}
    runs["qwen3"] = "causal causal-40-2 mass-40 warm-2"
    for experiment, names in runs.items():
        one = EXPERIMENTS[experiment]
        size = Size(experiment, one.seq_length, one.steps, one.batch)
        commands = Commands(size, [*THERE.split(), "--no-gradient-accumulation-fusion"], [], [], [])
        for name in names.split():
            words = commands.training(one.runs[name], OUT, OUT)
            text = words.index("--text-data")
            found[f"{experiment}, {name}"] = (1, [*words[: text + 1], *default_text(), *words[text + 2 :]])
    return found


LINES = {**of_two_gpus(), **of_layouts(), **of_losses(), **of_graphs(), **of_steps(), **of_experiments()}


@pytest.mark.parametrize("name", LINES)
def test_each_run_can_start(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus, command = LINES[name]
    words = command[command.index("megatron_lighthouse.pretrain_gpt") + 1 :]
    monkeypatch.chdir(tmp_path)
    size = ["--nodes", "1", "--gpus-per-node", str(gpus), "--arch", "hopper", "--device", "h200"]
    assert check.main([*size, "--", *words]) == 0, capsys.readouterr().err


def test_what_cannot_start_is_seen(capsys: pytest.CaptureFixture[str]) -> None:
    _, command = LINES["graphs, local"]
    words = command[command.index("megatron_lighthouse.pretrain_gpt") + 1 :]
    size = ["--nodes", "1", "--gpus-per-node", "1", "--arch", "hopper", "--device", "h200"]
    assert check.main([*size, "--", *words, "--recompute-granularity", "full"]) == 1
    assert "--cuda-graph-impl" in capsys.readouterr().err


def test_the_sessions_groups_are_those_of_the_readme() -> None:
    text = (ROOT / "experiments" / "README.md").read_text()
    assert all(f"$second --runs {runs} " in text for runs in SECOND.values())
