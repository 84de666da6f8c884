"""local.sh without a GPU: which points of a study run, what their run.json says, and what is refused before any starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_lighthouse.launch import check
from megatron_lighthouse.mcore.data.text import PADDED_VOCABULARY
from megatron_lighthouse.plan import scaling
from tests.launch.machine import PYTHON, local
from tests.launch.scripts import words

STUDY = "CP=1:2 SEQ=32768:98304 ATTENTION=dense:lighthouse"


def test_the_environments_python_wins(machine: Path) -> None:
    (machine / "own.env").write_text("NODES=1\nGPUS_PER_NODE=1\nARCH=cpu\nPYTHON=/nowhere\n")
    own = ("--cluster", "own.env", "--", "--mock-data")
    assert local(machine, *own).returncode == 0
    assert "/nowhere" in local(machine, *own, PYTHON="").stderr


def test_another_launchers_variables_are_left_out(machine: Path) -> None:
    """Kubernetes' PyTorchJob and `srun --pty` set them for ranks of their own."""
    (machine / "python").write_text(f'{PYTHON}env | grep -E "^(PET_|SLURM_PROCID)" >>"$NOTED"\nexit 0\n')
    others = {"PET_NNODES": "2", "PET_RDZV_BACKEND": "static", "SLURM_PROCID": "3", "SLURM_NTASKS": "4"}
    done = local(machine, "--gpus", "2", "--", "--mock-data", **others)
    assert done.returncode == 0, done.stderr
    noted = (machine / "noted").read_text()
    assert " --standalone --nnodes 1 --nproc-per-node 2 " in noted
    assert "PET_" not in noted
    assert "SLURM_PROCID" not in noted
    assert done.stderr.count("torchrun is not given the PET_NNODES PET_RDZV_BACKEND of the environment") == 1


def trained(machine: Path) -> list[str]:
    """The names of the points that were started, in order."""
    lines = (machine / "noted").read_text().splitlines()
    return [line.split("--tensorboard-dir ")[1].split("/tensorboard")[0].rsplit("/", 1)[1] for line in lines if "nproc" in line]


def test_a_study_runs_what_is_not_done(machine: Path) -> None:
    more = ("--text-data", "a text.txt", "--train-iters", "6", "--global-batch-size", "1", "--lighthouse-budget", "2048")
    more += ("--num-query-groups", "2")  # nothing without --group-query-attention
    done = local(machine, "--study", STUDY, "--", *more)
    names = [
        f"{attention}-{length}-cp{size}"
        for size in (1, 2)
        for length in (32768, 98304)
        for attention in ("dense", "lighthouse")
    ]
    assert trained(machine) == names
    assert done.returncode != 0
    assert "failed: dense-98304-cp2" in done.stderr
    noted = (machine / "noted").read_text().splitlines()
    first, last = noted[0], noted[-1]
    assert first.count("--point ") == 8
    assert "--nodes 1 --gpus-per-node 2 --exact --runs-here now -- " in first
    assert last == f"-m megatron_lighthouse.plan scaling {machine}/run --out {machine}/run"
    launched = next(line for line in noted if "/lighthouse-32768-cp2/" in line)
    assert "--nproc-per-node 2 " in launched
    assert "--save " not in launched
    assert launched.endswith("--context-parallel-size 2 --log-interval 1 --log-throughput")

    (machine / "noted").unlink()
    assert local(machine, "--study", STUDY, "--", *more).returncode == 2
    assert trained(machine) == ["dense-98304-cp2"]
    (machine / "noted").unlink()
    full = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")
    local(machine, "--study", "CP=1 SEQ=98304 ATTENTION=lighthouse", "--", *more, *full)
    assert trained(machine) == ["lighthouse-98304-cp1"]  # other arguments: again

    found = {path.parent.name: json.loads(path.read_text()) for path in (machine / "run").glob("*/run.json")}
    point = found["lighthouse-32768-cp2"]
    assert " --text-data a text.txt --train-iters 6 " in point.pop("arguments")
    assert point == {
        **{"attention": "lighthouse", "seq_length": 32768, "context_parallel": 2, "gpus": 2, "recipe": "530m-98k"},
        **{"global_batch": 1, "device": "h100", "vocab": PADDED_VOCABULARY, "recompute": "none", "cp_comm_type": "p2p"},
        **{"budget": 2048, "dense_first": 2, "dense_last": 2},
        **{"layers": 30, "hidden": 1024, "ffn": 1536, "heads": 8, "groups": 8, "head_dim": 128},
    }
    assert found["lighthouse-98304-cp1"]["recompute"] == "full"
    row, notes = scaling.read(machine / "run" / "lighthouse-32768-cp2")
    assert (row["seconds_a_step"], row["tokens_s_gpu"], row["peak_gib"], notes) == (1.0, 16384.0, 20.0, [])
    assert row["predicted_tokens_s_gpu"] > 0
    assert scaling.read(machine / "run" / "dense-98304-cp2")[0]["iterations"] == 0


def test_every_point_is_checked_before_one_runs(machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = (("dense", 98304, 1), ("lighthouse", 32768, 2), ("dense", 98304, 4))
    points = [
        f"{name} --attention {name} --seq-length {length} --max-position-embeddings {length} --context-parallel-size {size}"
        for name, length, size in sizes
    ]
    flags = [word for point in points for word in ("--point", point)]
    ours = ["--exact", "--nodes", "1", "--gpus-per-node", "2", "--", *words("530m-98k"), "--mock-data"]
    assert check.main([*flags, *ours, "--lighthouse-budget", "1536"]) == 1
    problems = capsys.readouterr().err.splitlines()[1:]
    assert len(problems) == 2
    assert "lighthouse: --seq-length 32768 must be a multiple of 192" in problems[0]
    assert "--lighthouse-budget 1024 or 2048" in problems[0]
    assert "= 4 GPUs, and there are 2" in problems[1]
    assert check.main([*flags[:4], *ours, "--global-batch-size", "1"]) == 0
    assert "2 ranks = TP 1 x CP 2 x PP 1 x DP 1; 32768 tokens" in capsys.readouterr().out

    (machine / "python").write_text("#!/bin/sh\necho $2 >>$NOTED\nexit 1\n")
    assert local(machine, "--study", STUDY, "--", "--mock-data").returncode == 2
    assert (machine / "noted").read_text() == "megatron_lighthouse.launch.check\n"


def test_gpus_are_those_that_are_there(machine: Path) -> None:
    assert "8 GPUs are asked for, and this machine shows 2: use --gpus 2" in local(machine, "--", "--mock-data").stderr
    study = ("--study", "CP=1 SEQ=98304 ATTENTION=dense", "--", "--mock-data", "--train-iters", "6")
    one = local(machine, *study, CUDA_VISIBLE_DEVICES="1")
    assert one.returncode == 0, one.stderr
    assert "no whole checkpoint" in local(machine, "--as", "evaluation", "--gpus", "1", "--", "--mock-data").stderr
    assert "--gpus-per-node 1 --exact" in (machine / "noted").read_text()
    assert "this process sees none (CUDA_VISIBLE_DEVICES='')" in local(machine, *study, CUDA_VISIBLE_DEVICES="").stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--nodes 2", "--nodes 2: local.sh runs on this machine alone: use --gpus"),
        ("--nodes 1 --time 20", "--time 20: local.sh has no time limit"),
    ],
)
def test_what_only_slurm_takes_is_refused(arguments: str, says: str, machine: Path) -> None:
    done = local(machine, *arguments.split(), *([] if "--" in arguments.split() else ["--"]), "--mock-data")
    assert done.returncode == 2
    assert says in done.stderr
    assert [line.split()[1] for line in (machine / "noted").read_text().splitlines()] == ["megatron_lighthouse.launch.check"]
    assert not (machine / "run").exists()


@pytest.mark.parametrize("kind", ["nsys", "torch"])
def test_a_profile_ends_with_how_to_read_it(kind: str, machine: Path) -> None:
    suffix, trace = {"nsys": ("nsys-rep", "profile"), "torch": ("json.gz", "torch_profile")}[kind]
    (machine / "nsys").write_text("#!/bin/sh\n")
    (machine / "nsys").chmod(0o755)
    (machine / "python").write_text(f'{PYTHON}env | grep ^LIGHTHOUSE_PROF >>"$NOTED"\necho >{machine}/run/{trace}/a.{suffix}\n')
    steps = ("--profile", kind, "--profile-steps", "4-5", "--profile-ranks", "0 1", "--gpus", "2", "--", "--train-iters", "6")
    done = local(machine, *steps, "--mock-data")
    assert done.returncode == 0, done.stderr
    assert f"-m megatron_lighthouse.profiling report {machine}/run/profile/a.{suffix}\n" in done.stdout
    noted = (machine / "noted").read_text()
    first, torch = {"nsys": (3, ""), "torch": (4, "--use-pytorch-profiler ")}[kind]
    assert f"--profile {torch}--profile-step-start {first} --profile-step-end {first + 2} --profile-ranks 0 1\n" in noted
    for line in (
        f"LIGHTHOUSE_PROFILER={kind}",
        "LIGHTHOUSE_PROFILER_RANKS=0 1",
        f"LIGHTHOUSE_PROFILER_FOLDER={machine}/run/profile",
    ):
        assert f"{line}\n" in noted


def test_an_evaluation_takes_no_earlier_loss(machine: Path) -> None:
    (machine / "run" / "checkpoints").mkdir(parents=True)
    (machine / "run" / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("9")
    (machine / "run" / "logs").mkdir()
    line = " validation loss at iteration 9 on validation set | lm loss value: 2.5E+00 | lm loss PPL: 1.2E+01 | \n"
    (machine / "run" / "logs" / "evaluation.log").write_text(line)
    done = local(machine, "--as", "evaluation", "--gpus", "1", "--", "--mock-data")
    assert done.returncode == 2
    assert "There is no validation loss in" in done.stderr
    assert not (machine / "run" / "evaluation.json").exists()
