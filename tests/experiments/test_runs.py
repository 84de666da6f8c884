"""Experiments and their runs: what the product takes, and what is refused before a run is trained."""

from __future__ import annotations

import argparse
import re
import subprocess
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from experiments import bench
from experiments.__main__ import main
from experiments.machine import seeing, shared_out
from experiments.pairs import dense_of
from experiments.plots import colours
from experiments.runs import BASE, EXPERIMENTS, Size, attention_arguments, model_arguments
from experiments.tables import Results
from megatron_lighthouse.mcore.command_line import settings
from tests.mcore.harness import ROOT


def size_of(experiment: str) -> Size:
    one = EXPERIMENTS[experiment]
    return Size(experiment, one.seq_length, one.steps, one.batch)


@pytest.mark.parametrize(("experiment", "name"), [(one, name) for one in EXPERIMENTS for name in EXPERIMENTS[one].runs])
def test_every_run_is_one_that_the_product_takes(experiment: str, name: str) -> None:
    size, run = size_of(experiment), EXPERIMENTS[experiment].runs[name]
    parser = settings.add_arguments(argparse.ArgumentParser(allow_abbrev=False))
    args, rest = parser.parse_known_args(attention_arguments(run, size))
    assert (args.attention == "lighthouse") == bool(run.share)
    more = "--context-parallel-size 2 --high-priority-stream-groups cp " if run.ranks == 2 else ""
    more += f"--lighthouse-telemetry-interval {size.steps // 10} " if run.telemetry else ""
    more += f"--exit-interval {run.until}" if run.until else ""
    assert rest == more.split()
    assert set(run.against) <= EXPERIMENTS[experiment].runs.keys()
    if args.attention == "lighthouse":
        found = settings.settings_from(args)
        assert found.config.geometry(size.seq_length)
        assert (schedule := found.schedule) is not None
        assert not list(schedule.problems(size.steps))
        assert schedule.stage2_at == run.switch(size.steps) == size.steps * run.share // 100
        assert schedule.stage2_at + schedule.return_iters == run.dense_from(size.steps)
        assert (schedule.dense_warmup_iters or 0) == run.warmup_to(size.steps) == size.steps * run.warmup // 100


def test_help_names_the_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert f"{BASE}: {EXPERIMENTS['recipe'].runs[BASE].title}" in capsys.readouterr().out


def test_variants_change_one_thing() -> None:
    runs, size = EXPERIMENTS["variants"].runs, size_of("variants")
    base = attention_arguments(runs[BASE], size)
    budget, tile = (base.index(f"--lighthouse-{name}") + 1 for name in ("budget", "tile-budget"))
    found = {name: attention_arguments(run, size) for name, run in runs.items() if run.share}
    changed = {name: [i for i, (a, b) in enumerate(zip(base, found[name], strict=False)) if a != b] for name in found}
    assert changed["norm-60-again"] == []
    for name in ("norm-75", "summary-60", "dilated-60"):
        assert len(changed[name]) == 1, name
    for name, k in (("half-budget", "256"), ("double-budget", "1024")):
        assert (changed[name], found[name][budget]) == ([budget, tile], k)
    # k/m tiles: how far ahead a selection sees
    assert {int(arguments[budget]) / int(arguments[tile]) for arguments in found.values()} == {4}


def test_second_has_its_groups_and_a_repeat_of_what_may_be_best() -> None:
    """The README's commands name runs that are there, and with another seed each of the first six is the same."""
    named = re.findall(r"^\$second --runs (.*?) +# ([ABC])$", (ROOT / "experiments" / "README.md").read_text(), re.MULTILINE)
    groups = {group: runs.split() for runs, group in named}
    runs, size = EXPERIMENTS["second"].runs, size_of("second")
    assert [len(group) for group in groups.values()] == [6, 6, 6]
    assert {name for group in groups.values() for name in group} <= runs.keys()
    assert groups["B"] == [f"{name}-2" for name in groups["A"]]

    def of(name: str) -> str:
        return " ".join([runs[name].model, *attention_arguments(runs[name], size)])

    assert [of(name) for name in groups["A"]] == [of(name) for name in groups["B"]]
    assert {runs[name].seed for name in groups["B"]} == {2}
    edges = {name: of(name).partition("--lighthouse-edge-budget ")[2].split()[0] for name in runs if "edge" in name}
    assert edges == {**dict.fromkeys(edges, "1024"), "edge-k": "512", "edge-4k": "2048"}
    for name in [name for name in runs if name.endswith("-again")]:
        assert of(name) == of(name.removesuffix("-again"))
    causal = [name for name in runs if "--lighthouse-causal-selection" in of(name)]
    assert all(runs[name].hindsight for name in causal)
    assert {*causal} == {name for name in runs if "causal" in name}
    assert dense_of(Results(facts={"experiment": "second"}), "normed-mass") == "normed"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_each_run_has_a_colour_of_its_own(experiment: str) -> None:
    found = colours(Results(facts={"experiment": experiment}))
    assert found.keys() == EXPERIMENTS[experiment].runs.keys()
    assert len({*found.values()}) == len(found)


def test_a_run_of_another_experiment_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--experiment", "tiny", "--runs", "summary-60"])
    said = " ".join(capsys.readouterr().err.split())
    assert "--runs summary-60 is not one of --experiment tiny: dense, norm-60, dense-2, norm-60-2, cp-2." in said


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--at-once 0", "--at-once 0 must be at least 1."),
        ("--within 40", "--within 40 leaves no time: give more than the 40 s that saving may take."),
        ("--hindsight-samples -1", "--hindsight-samples -1 must be at least 1, or 0 for no hindsight."),
        ("--passkey-samples -1", "--passkey-samples -1 must be at least 0, for none."),
        ("--loss-sequences -4", "--loss-sequences -4 must be at least 0, for none."),
        ("--corpus /no/such", "--corpus /no/such has no train/*.txt: give a folder that recipe.corpus made, or leave it out."),
        ("--seq-length 1024", "the held-out text has 513 tokens: --hindsight-samples needs at least 2048"),
    ],
)
def test_refused_before_a_run_is_trained(
    options: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = folders(tmp_path, monkeypatch)
    with pytest.raises(SystemExit):
        main(["--experiment", "tiny", "--runs", BASE, BASE, "--hindsight-samples", "2", *paths, *options.split()])
    assert says in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["parallax", "parallax-normed", "wall"])
def test_studies_have_equal_parameters(name: str) -> None:
    """Of a layer, by the arguments: q, k, v and output, the MLP, and linear_r or linear_g where there is one."""
    found = {}
    for run, one in EXPERIMENTS[name].runs.items():
        arguments = model_arguments(one, size_of(name), [])
        last = {flag: int(value) for flag, value in pairwise(arguments) if flag in ("--hidden-size", "--ffn-hidden-size")}
        hidden = last["--hidden-size"]
        found[run] = (4 + (one.attention != "dense")) * hidden**2 + 3 * hidden * last["--ffn-hidden-size"]
    assert len({*found.values()}) == 2
    assert max(found.values()) < 1.002 * min(found.values())


def test_runs_side_by_side_share_out_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one GPU in turn, among those that can be seen; runs one after the other have the same."""
    runs = {"a": 1, "b": 1, "both": 2, "c": 1}
    assert shared_out(runs, 4, gpus=2) == {"a": [0], "b": [1], "both": [0, 1], "c": [0]}
    assert shared_out(runs, 1, gpus=2) == {"a": [0], "b": [0], "both": [0, 1], "c": [0]}
    assert shared_out({"a": 1, "b": 1}, 2, gpus=0) == {"a": [0], "b": [0]}
    assert seeing([0]) == ({} if not torch.cuda.is_available() else {"CUDA_VISIBLE_DEVICES": "0"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-1234")
    assert seeing([1]) == {"CUDA_VISIBLE_DEVICES": "GPU-1234"}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert seeing([0, 1]) == {"CUDA_VISIBLE_DEVICES": "0,1"}


def test_what_was_refused_or_never_saved_does_not_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same folder takes other values until a run has saved by those that it has."""
    given = ["--experiment", "tiny", "--runs", "dense", *folders(tmp_path, monkeypatch)]
    assert main([*given, "--learning-rate-that-is-none", "1"]) == 1
    log = tmp_path / "work" / "dense" / "train.log"
    said = log.read_text()
    monkeypatch.setattr(bench, "START", time.monotonic() - 60)  # so that no time is left
    assert main([*given, "--within", "50", "--steps", "12"]) == bench.CUT_OFF
    assert not log.exists()
    assert log.with_name("train.log.before").read_text() == said
    checkpoints = tmp_path / "work" / "dense" / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("5")
    with pytest.raises(SystemExit):
        main([*given, "--steps", "14"])
    assert "holds dense with --eval-interval 13 --train-iters 12, not" in capsys.readouterr().err


def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A small corpus, and where no process can be started."""
    monkeypatch.setattr(subprocess, "Popen", None)
    for part in ("train", "held-out"):
        (tmp_path / "corpus" / part).mkdir(parents=True)
        (tmp_path / "corpus" / part / "1.txt").write_text(512 * "a")
    return [f"--{name}={tmp_path / name}" for name in ("corpus", "work", "out")]
