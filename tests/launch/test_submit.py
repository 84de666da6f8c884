"""What must fail before a job is queued, and what the launch scripts ask Slurm for."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lighthouse.launch import check, data_files
from megatron_lighthouse.mcore.command_line import kept
from megatron_lighthouse.mcore.command_line.stored import TRACKER
from tests.launch.scripts import LAUNCH, ROOT, refused, submit, words
from tests.launch.slurm import Slurm

RECIPES = sorted(path.stem for path in (LAUNCH / "recipes").glob("*.args"))
ONE_NODE = (
    "530m-98k",
    "530m-256k-cp8",
    "llama3-8b-128k",
    "qwen3-8b-256k",
    "qwen3-8b-1m-8gpu",
    "gpt-oss-20b-128k",
    "deepseek-16b-128k",
    "hybrid-8b-128k",
)
FITS = {"530m-1m": 32, "llama3-8b-512k": 64, "llama3-8b-1m": 128, "cpu-test": 2, "qwen3-0.6b-1m-1gpu": 1}
FITS |= dict.fromkeys(ONE_NODE, 8)
"""GPUs that a recipe is for."""


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_fits(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = ["--nodes", str(FITS[recipe]), "--gpus-per-node", "1"]
    assert check.main([*nodes, "--", *words(recipe), "--mock-data"]) == 0
    assert f"{FITS[recipe]} ranks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("recipe", "nodes", "extra", "says"),
    [
        ("llama3-8b-512k", 6, "", ("= 64 must divide the GPUs of the job, 6 nodes x 8 = 48: use --nodes 8 or 16",)),
        ("530m-1m", 4, "--seq-length 1000000", ("--seq-length 1000000 must be a multiple", "1024000")),
        ("530m-98k", 1, "--global-batch-size 12", ("multiple of 8", "use --global-batch-size 8 or 16")),
        ("llama3-8b-512k", 8, "--num-layers 33", ("--num-layers 33",)),
        ("llama3-8b-512k", 8, "--tensor-model-parallel-size 16 --context-parallel-size 2", ("--num-query-groups 8 must",)),
        ("530m-98k", 1, "--train-iters 0", ("--train-iters 0 trains nothing: give",)),
        (
            "530m-98k",
            1,
            "--seq-length 131072",
            ("--max-position-embeddings 98304 must be at least", "use --max-position-embeddings 131072"),
        ),
        ("530m-98k", 1, "--attention dense --context-parallel-size 8 --seq-length 98300", ("a multiple of 16", "use 98288")),
        (
            "llama3-8b-512k",
            8,
            "--cp-comm-type a2a",
            ("shares out a tensor-parallel rank's 2 key/value heads", "--context-parallel-size 2"),
        ),
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
    assert "use --nodes 2." in error  # a batch of one is for one data-parallel rank


def test_a_study_is_an_array_of_points_that_can_all_run(tmp_path: Path) -> None:
    ours = ["--cluster", "cpu-test", "--recipe", "cpu-test", "--study", "CP=2:3 SEQ=256 ATTENTION=dense:lighthouse"]
    error = refused(tmp_path, *ours, "--", "--mock-data")
    assert "dense-256-cp3, lighthouse-256-cp3: " in error
    assert "256-cp2" not in error
    done = submit(tmp_path, *ours, "--check", "0", "--sbatch", "--array=0-3%1", "--", "--mock-data")
    assert done.returncode == 0, done.stderr
    flags, _, job = (tmp_path / "queued").read_text().splitlines()[-1].partition("scaling.sbatch ")
    assert "/logs/%A_%a.log " in flags
    assert flags.split()[-3:-1] == ["--array=0-3", "--array=0-3%1"]  # the last counts
    assert "--as point --study CP=2:3 SEQ=256 ATTENTION=dense:lighthouse -- --mock-data" in job


def test_missing_data_is_not_queued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(tmp_path, "--cluster", "cpu-test", "--recipe", "cpu-test", "--", "--data-path", "0.5", "nowhere/corpus")
    assert "--data-path nowhere/corpus has no nowhere/corpus.bin" in error
    assert check.main(["--nodes", "2", "--gpus-per-node", "1", "--", *words("cpu-test")]) == 1
    assert "--text-data PATH or --mock-data" in capsys.readouterr().err
    tokenizer = ["--mock-data", "--tokenizer-model"]
    assert check.main(["--nodes", "2", "--gpus-per-node", "1", "--", *words("cpu-test"), *tokenizer, "/nowhere/model"]) == 1
    assert "--tokenizer-model /nowhere/model is not there" in capsys.readouterr().err
    assert check.main(["--nodes", "2", "--gpus-per-node", "1", "--", *words("cpu-test"), *tokenizer, "meta-llama/Llama-3"]) == 0


def test_what_the_container_does_not_see_is_not_queued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the Python that the cluster file names for the check; that of the image is not here."""
    file, python = tmp_path / "mine.env", tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] || echo "$@" >{tmp_path}/noted\n')
    python.chmod(0o755)
    keys = f"NODES=2\nGPUS_PER_NODE=1\nARCH=cpu\nIMAGE=image\nPYTHON=/nowhere\nCHECK_PYTHON={python}\n"
    file.write_text(f"{keys}MOUNTS={tmp_path}/elsewhere:/data:ro,/models\n")
    done = submit(tmp_path, "--cluster", str(file), "--recipe", "cpu-test", "--", "--mock-data")
    assert done.returncode == 0, done.stderr
    sees = f"{ROOT}:{tmp_path}/run:/data={tmp_path}/elsewhere:/models"
    assert f" --sees {sees} -- " in (tmp_path / "noted").read_text()

    text, model = str(ROOT / "LICENSE"), tmp_path / "model"
    model.write_text("model")
    (tmp_path / "elsewhere" / "first").mkdir(parents=True)
    (tmp_path / "elsewhere" / "first" / TRACKER).write_text("5")
    given = ["--text-data", text, "--tokenizer-model", str(model), "--pretrained-checkpoint", "/data/first"]
    ours = ["--nodes", "2", "--gpus-per-node", "1", "--", *words("cpu-test"), *given]
    assert check.main(["--sees", sees, *ours]) == 1
    error = capsys.readouterr().err
    assert (
        f"--tokenizer-model {model} is not in the container (IMAGE), which sees {ROOT} {tmp_path}/run /data /models: " in error
    )
    assert error.count("is not in the container") == 1
    assert check.main(["--sees", f"{sees}:{tmp_path}", *ours]) == check.main(ours[:-2]) == 0
    ours[ours.index(str(model))] = "/in/model"  # its name in the container
    assert check.main(["--sees", f"{sees}:/in={tmp_path}", *ours]) == 0
    assert check.main(["--sees", f"{sees}:/in={tmp_path}/not", *ours]) == 1
    assert "--tokenizer-model /in/model is not there" in capsys.readouterr().err


@pytest.mark.parametrize("name", [*kept.WRITTEN, *data_files.LEFT])
def test_what_a_container_would_lose(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    ours = ["--nodes", "2", "--gpus-per-node", "1", "--sees", "/data:/runs", "--", *words("cpu-test"), "--mock-data"]
    assert check.main([*ours, name, "/elsewhere/x"]) == 1
    assert f"{name} /elsewhere/x is not in the container (IMAGE), which sees /data /runs: " in capsys.readouterr().err
    check.main([*ours, name, "/runs/x"])
    assert "is not in the container" not in capsys.readouterr().err


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
        ("PREFLIGHT_SECONDS=2m", "PREFLIGHT_SECONDS='2m' in"),
        ("ARCH=hopper", "is one core for each GPU: set EXCLUSIVE=1, or CPUS_PER_TASK"),
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
        ("--cluster moon --recipe cpu-test", "one of cpu-test gb200 hgx-b200"),
        ("--cluster cpu-test --recipe moon", "one of 530m-1m 530m-256k-cp8"),
        ("--cluster cpu-test", "--recipe is missing"),
        ("--cluster cpu-test --recipe cpu-test --lr 1", "--lr is not an option of submit.sh"),
        ("--cluster cpu-test --recipe cpu-test --nodes x", "--nodes x must be a whole number"),
        ("--cluster cpu-test --recipe cpu-test --check no", "--check no must be 0 or 1"),
        ("--cluster cpu-test --recipe cpu-test --only-check yes", "--only-check yes must be 0 or 1"),
        ("--cluster cpu-test --recipe cpu-test --sbatch --array=0-3", "let one run at a time, as --array=0-3%1 does"),
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
        ("--cluster cpu-test --recipe cpu-test --profile torch --profile-ranks 2 -- --mock-data", "use 0 to 1"),
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


def test_a_login_node_without_torch_is_told_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "mine.env"
    file.write_text("NODES=2\nGPUS_PER_NODE=1\nARCH=cpu\nPYTHON=/nowhere/python\n")
    error = refused(tmp_path, "--cluster", str(file), "--recipe", "cpu-test", "--", "--mock-data")
    assert "/nowhere/python is none here" in error
    assert "--check 0" in error
    assert "No such file" not in error


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
