"""local.sh without a GPU: which points of a study run, what their run.json says, and what is refused before any starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_lighthouse.launch import check, dlprof
from megatron_lighthouse.mcore.data.text import PADDED_VOCABULARY
from megatron_lighthouse.plan import scaling
from tests.launch.test_submit import LAUNCH, words

STUDY = "CP=1:2 SEQ=32768:98304 ATTENTION=dense:lighthouse"
PYTHON = """#!/usr/bin/env bash
# in the place of Python: notes what is to run; trains by a line of log, but never dense on two processes
echo "$*" >>"$NOTED"
[[ $2 == torch.distributed.run ]] || exit 0
[[ "$* " != *"--nproc-per-node 2 "*"--attention dense --seq-length 98304 "* ]] || exit 1
for i in 1 2 3 4 5 6; do echo " iteration    $i/    6 | elapsed time per iteration (ms): 1000.0 | lm loss: 2.0E+00 |"; done
echo "[Rank 0] (after 2 iterations) memory (MB) | allocated: 900.00 | max allocated: 20480.00 | reserved: 1 |"
"""
NVIDIA_SMI = """#!/bin/sh
case "$*" in
    *name*) echo "NVIDIA H100 80GB HBM3" ;;
    -L) for gpu in 0 1; do echo "GPU $gpu: NVIDIA H100 80GB HBM3 (UUID: GPU-$gpu)"; done ;;
esac
"""


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder of programs: a machine of two H100s."""
    for name, text in (("python", PYTHON), ("nvidia-smi", NVIDIA_SMI)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def local(machine: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    environment |= {"PATH": f"{machine}:{os.environ['PATH']}", "PYTHON": str(machine / "python"), "NOTED": f"{machine}/noted"}
    command = [str(LAUNCH / "local.sh"), "--cluster", "hgx-h100", "--recipe", "530m-98k", "--run", str(machine / "run")]
    return subprocess.run([*command, *arguments], env={**environment, **variables}, capture_output=True, text=True, cwd=machine)


def test_the_environments_python_wins(machine: Path) -> None:
    (machine / "own.env").write_text("NODES=1\nGPUS_PER_NODE=1\nARCH=cpu\nPYTHON=/nowhere\n")
    own = ("--cluster", "own.env", "--", "--mock-data")
    assert local(machine, *own).returncode == 0
    assert "/nowhere" in local(machine, *own, PYTHON="").stderr


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
    assert "--nodes 1 --gpus-per-node 2 --exact -- " in first
    assert last == f"-m megatron_lighthouse.plan scaling {machine}/run --out {machine}/run"
    launched = next(line for line in noted if "/lighthouse-32768-cp2/" in line)
    assert "--nproc-per-node 2 " in launched
    assert "--save " not in launched
    assert launched.endswith("--context-parallel-size 2 --log-interval 1 --log-throughput")

    (machine / "noted").unlink()
    assert local(machine, "--study", STUDY, "--", *more).returncode != 0
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
        **{"levels": 3, "pooling": 4, "budget": 2048, "dense_first": 2, "dense_last": 2},
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
    assert check.main([*flags, *ours]) == 1
    problems = capsys.readouterr().err.splitlines()[1:]
    assert len(problems) == 2
    assert "lighthouse: --seq-length 32768 must be a multiple of 192" in problems[0]
    assert "--lighthouse-budget 1024 or 2048" in problems[0]
    assert "= 4 GPUs, and there are 2" in problems[1]
    assert check.main([*flags[:4], *ours, "--lighthouse-budget", "2048", "--global-batch-size", "1"]) == 0
    assert "2 ranks = TP 1 x CP 2 x PP 1 x DP 1; 32768 tokens" in capsys.readouterr().out

    (machine / "python").write_text("#!/bin/sh\necho $2 >>$NOTED\nexit 1\n")
    assert local(machine, "--study", STUDY, "--", "--mock-data").returncode != 0
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
        ("--gpus 1 -- --context-parallel-size 2", "--gpus 1 must be a multiple of 2"),
    ],
)
def test_what_only_slurm_takes_is_refused(arguments: str, says: str, machine: Path) -> None:
    done = local(machine, *arguments.split(), *([] if "--" in arguments.split() else ["--"]), "--mock-data")
    assert done.returncode == 2
    assert says in done.stderr
    assert not (machine / "noted").exists()
    assert not (machine / "run").exists()


@pytest.mark.skipif(not Path("/sys/bus/pci/devices").is_dir(), reason="a kernel without PCI devices")
@pytest.mark.parametrize(
    ("switch", "allowed", "rank", "says"),
    [
        ("1", True, 0, "NUMA node 1"),
        ("1", False, 0, "rank 0: no NUMA binding: numactl may not bind to node 1"),
        ("1", False, 3, "rank 3: no NUMA binding: numactl may not bind to node 1"),
        ("0", True, 0, "no NUMA binding: NUMA=0 in the cluster file"),
    ],
)
def test_a_rank_that_cannot_be_bound_runs_unbound(switch: str, allowed: bool, rank: int, says: str, machine: Path) -> None:
    (machine / "numa_node").write_text("1")
    for name, text in (
        ("nvidia-smi", f"echo 0000/../../../..{machine}"),  # a device whose node is in our file
        ("numactl", f'{"" if allowed else "exit 1"}\nshift 2\nBOUND=1 exec "$@"'),
    ):
        (machine / name).write_text(f"#!/bin/sh\n{text}\n")
        (machine / name).chmod(0o755)
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "4", "LIGHTHOUSE_NUMA": switch, "TMPDIR": str(machine)}
    environment = {**os.environ, **own, "PATH": f"{machine}:{os.environ['PATH']}"}
    command = ["bash", LAUNCH / "task.sh", "bash", "-c", 'echo "bound ${BOUND:-0}"']
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert f"launch: {says}\n" in done.stdout
    assert f"bound {int(allowed and switch == '1')}\n" in done.stdout


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


@pytest.mark.parametrize("kind", ["nsys", "dlprof"])
def test_the_chosen_ranks_are_wrapped(kind: str, machine: Path) -> None:
    (machine / kind).write_text('#!/bin/sh\necho "$RANK $*" >>"$NOTED"\n')
    (machine / kind).chmod(0o755)
    chosen = {"LIGHTHOUSE_PROFILER": kind, "LIGHTHOUSE_PROFILER_RANKS": "1 3", "LIGHTHOUSE_PROFILER_FOLDER": "/traces"}
    own = {
        "PATH": f"{machine}:{os.environ['PATH']}",
        "NOTED": f"{machine}/noted",
        "LIGHTHOUSE_ARCH": "cpu",
        "TMPDIR": str(machine),
    }
    for rank in range(4):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "4"}
        subprocess.run(
            ["bash", LAUNCH / "task.sh", "true", "and", "more"], env={**os.environ, **chosen, **own, **ranks}, check=True
        )
    noted = (machine / "noted").read_text().splitlines()
    assert [line[0] for line in noted] == ["1", "3"]
    options = {
        "nsys": "profile --capture-range=cudaProfilerApi --capture-range-end=stop",
        "dlprof": "--mode=pytorch --force=true",
    }
    assert noted[0].startswith(f"1 {options[kind]} ")
    assert noted[0].endswith("_1 true and more")


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"TMPDIR": "{machine}"}, "{machine}"),
        ({"TMPDIR": "/proc/nowhere"}, "/tmp"),
        ({"TMPDIR": "/proc/nowhere", "SLURM_PROCID": "0", "SLURM_TMPDIR": "{machine}"}, "{machine}"),
    ],
)
def test_caches_lie_on_the_node(variables: dict[str, str], folder: str, machine: Path) -> None:
    own = {name: value.format(machine=machine) for name, value in variables.items()}
    own |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LIGHTHOUSE_ARCH": "cpu"}
    environment = {name: value for name, value in os.environ.items() if "CACHE_DIR" not in name}
    command = ["bash", LAUNCH / "task.sh", "true"]
    done = subprocess.run(command, env={**environment, **own}, capture_output=True, text=True, check=True)
    assert f" TRITON_CACHE_DIR={folder.format(machine=machine)}/megatron_lighthouse-{os.getuid()}/triton\n" in done.stdout


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


STAND_IN = """#!/bin/sh
case "$*" in
*device_count*) echo $GPUS ;;
*scaling_points.py*) exec {python} "$@" ;;
*context_parallel.py*) echo "$LIGHTHOUSE_COPY_ENGINE: $*" >>"$NOTES"; [ ! -e "$BROKEN" ] ;;
*launch.check*) exit 1 ;;
esac
"""
"""A Python whose machine has GPUS, and whose points all fail."""


def study(machine: Path, part: str, gpus: int, *more: str) -> subprocess.CompletedProcess[str]:
    (machine / "python").write_text(STAND_IN.format(python=sys.executable))
    own = {"PATH": f"{machine}:{os.environ['PATH']}", "PYTHON": str(machine / "python"), "GPUS": str(gpus)}
    own |= {"NOTES": str(machine / "notes"), "BROKEN": str(machine / "broken")}
    command = ["bash", LAUNCH.parent / "benchmarks" / "scaling.sh", "--out", machine / "out", "--work", machine / "work"]
    return subprocess.run([*command, "--part", part, *more], env={**os.environ, **own}, capture_output=True, text=True)


def test_a_failed_point_is_the_status_of_the_scaling_study(machine: Path) -> None:
    done = study(machine, "one", 2)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.count(f"{machine}/work/study-CP=1 ") == 6
    assert (machine / "out" / "scaling.tgz").exists()


def test_the_study_of_four_gpus_tries_each_point_on_its_own(machine: Path) -> None:
    done = study(machine, "4", 4)
    assert done.returncode == 1, done.stdout + done.stderr
    found = {ranks: done.stderr.count(f"-CP={ranks} ") for ranks in (1, 2, 4)}
    assert found == {1: 5, 2: 3 + 2 + 1, 4: 4 + 4 + 3}
    attention = [line.split() for line in (machine / "notes").read_text().splitlines()]
    assert [(words[0], words[3]) for words in attention] == [(":", "4"), (":", "2")]
    order = [line.split(":")[0] for line in done.stdout.splitlines() if ": status " in line]
    assert order[0] == "attention on 4"
    assert order.index("1m") > order.index("study")
    assert order.index("tp2") > order.index("1m")


def test_a_stage_of_the_study_alone(machine: Path) -> None:
    """What a machine that was taken away left for the next one."""
    done = study(machine, "2", 2, "--stage", "late")
    order = [line.split(":")[0] for line in done.stdout.splitlines() if ": status " in line]
    assert order == ["agreement", "tp2", "pp2", "all_gather", "a2a", "study"]
    assert not (machine / "notes").exists()  # of attention
    done = study(machine, "2", 2, "--stage", "million")
    order = [line.split(":")[0] for line in done.stdout.splitlines() if ": status " in line]
    assert order == ["1m-all-layers", "1m-one-dense", "1m", "1m"]
    refused = study(machine, "all", 2, "--stage", "late")
    assert (refused.returncode, refused.stderr) == (2, "--stage is study, million or late, and of --part 2, 4 or 8.\n")


def test_attention_that_fails_is_timed_over_nccl(machine: Path) -> None:
    (machine / "broken").touch()
    done = study(machine, "4", 4)
    lines = (machine / "notes").read_text().splitlines()
    assert ["--part time --quick" in line for line in lines] == [False, True, False, True]
    assert [line.split()[0] for line in lines if "--quick" in line] == ["0:"] * 2
    assert f"attention on 4: {machine}/work/attention-4.log" in done.stderr


def test_the_study_needs_its_gpus(machine: Path) -> None:
    done = study(machine, "8", 4)
    assert done.returncode == 2
    assert "--part 8 takes 8 GPUs, and 4 can be seen" in done.stderr
    done = study(machine, "all", 1)
    assert (done.returncode, done.stderr) == (2, "--part all takes 2 GPUs, and 1 can be seen.\n")


def test_dlprof_is_started_on_the_chosen_ranks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    module = SimpleNamespace(init=lambda: calls.append(os.environ["RANK"]))
    monkeypatch.setitem(sys.modules, "nvidia_dlprof_pytorch_nvtx", module)
    monkeypatch.setenv("LIGHTHOUSE_PROFILER_RANKS", "1")
    for profiler in ("nsys", "dlprof"):
        monkeypatch.setenv("LIGHTHOUSE_PROFILER", profiler)
        for rank in "01":
            monkeypatch.setenv("RANK", rank)
            dlprof.start()
    assert calls == ["1"]
