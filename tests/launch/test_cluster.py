"""The launch scripts as they are, on an emulated Slurm: to completion, and through what ends jobs early."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_lighthouse.plan.__main__ import main
from megatron_lighthouse.plots import read_scalars
from tests.launch import slurm
from tests.launch.slurm import Slurm

ROOT = Path(__file__).parents[2]
Words = tuple[str, ...]
DATA = ("--text-data", str(ROOT / "LICENSE"))
ITERATION = re.compile(r"iteration +(\d+)/ .*lm loss: (\S+)")


def submit(
    cluster: Slurm, run: Path, *options: str, file: Path | str = "cpu-test", data: Words = DATA, bin: str = "", **more: str
) -> str:
    """The number of the queued job, which finds programs in `bin` first."""
    path = f"{bin}:{Path(sys.executable).parent}:{cluster.environment['PATH']}".removeprefix(":")
    command = ["--cluster", str(file), "--recipe", "cpu-test", "--run", str(run), *options]
    done = cluster.run(str(ROOT / "launch" / "submit.sh"), *command, "--", *data, PATH=path, **more)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def cluster_file(folder: Path, *lines: str) -> Path:
    """That of the CPU with some keys set otherwise."""
    file = folder / "cluster.env"
    file.write_text((ROOT / "launch" / "clusters" / "cpu-test.env").read_text() + "\n".join(lines) + "\n")
    return file


def log(run: Path, name: str) -> str:
    file = run / "logs" / f"{name}.log"
    return file.read_text(errors="replace") if file.exists() else ""


def losses(text: str) -> dict[int, str]:
    return {int(iteration): loss for iteration, loss in ITERATION.findall(text)}


def wait_for[T](what: Callable[[], T], seconds: float, why: Callable[[], str]) -> T:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.05)
    raise AssertionError(why()[-5000:])


@pytest.mark.slow
def test_a_run_survives_a_dead_rank_and_the_time_limit(cluster: Slurm, tmp_path: Path) -> None:
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    iterations = ("--train-iters", "40", *DATA)
    # Slurm looks at its clock every 30 s, and warns up to so much earlier: 45 to 75 s after the start, when every rank trains
    hasty = cluster_file(tmp_path, "TIME=2", "SIGNAL_SECONDS=45", "MAX_REQUEUES=6", "PREFLIGHT=0")
    job = submit(cluster, broken, "--check", "0", file=hasty, data=iterations)

    def train(first: int) -> list[int]:
        """The restarts that trained beyond their first checkpoint, from this number on."""
        return [number for number in range(first, 7) if len(losses(log(broken, f"{job}_{number}"))) > 6]

    def ended(restart: int) -> list[str]:
        """Its status, once there is one."""
        return re.findall(rf"restart {restart}: the ranks ended with status (\d+)", log(broken, job))

    def everything() -> str:
        return "\n".join(path.read_text(errors="replace")[-2000:] for path in sorted((broken / "logs").iterdir()))

    failing = wait_for(lambda: train(0), 150, everything)[-1]
    os.kill(cluster.ranks()[1], signal.SIGKILL)
    killed = time.monotonic()
    status = wait_for(lambda: ended(failing), 30, everything)
    assert time.monotonic() - killed < 30
    assert int(status[0]), log(broken, job)

    # one that goes on is stopped until Slurm's warning waits for it; the uninterrupted run has the machine meanwhile
    restart = wait_for(lambda: train(failing + 1), 200, everything)[-1]
    ranks = cluster.ranks()
    for process in ranks.values():
        os.kill(process, signal.SIGSTOP)
    other = submit(cluster, whole, data=iterations)
    end = rf"restart {restart}: .* status 0 at iteration (\d+)"

    def saved() -> list[str]:
        for process in ranks.values():
            slurm.go_on(process, signal.SIGTERM)
        return re.findall(end, log(broken, job))

    saved_at = wait_for(saved, 200, everything)
    stopped_at = max(losses(log(broken, f"{job}_{restart}")))
    assert int(saved_at[0]) == stopped_at < 40

    assert cluster.wait(other)["JobState"] == "COMPLETED", log(whole, f"{other}_0")[-3000:]
    state = cluster.wait(job)
    assert state["JobState"] == "COMPLETED", everything()
    assert int(state["Restarts"]) > restart
    # TensorBoard has every step's loss; Megatron's printed one is a mean over two in the second step after a start
    (steps, values), (same_steps, same_values) = (read_scalars(run / "tensorboard")["lm loss"] for run in (whole, broken))
    assert list(steps) == list(same_steps) == list(range(1, 41))
    assert list(values) == list(same_values)
    parts = [losses(log(broken, f"{job}_{number}")) for number in range(int(state["Restarts"]) + 1)]
    assert min(parts[restart + 1]) == stopped_at + 1
    assert min(parts[restart]) > 1

    assert "preflight: 2 nodes are fit" in log(whole, other)
    text = log(whole, f"{other}_0")
    assert text.count("launch: the environment of 2 ranks") == 1
    for line in ("MASTER_ADDR=node", "OMP_NUM_THREADS=1", "TRITON_CACHE_DIR=/"):
        assert f"launch:   {line}" in text

    # its last checkpoint, loaded for nothing but the validation loss
    job = submit(cluster, whole, "--as", "evaluation", data=(*iterations, "--eval-iters", "2", "--use-distributed-optimizer"))
    assert cluster.wait(job)["JobState"] == "COMPLETED", log(whole, f"{job}_0")[-3000:]
    found = json.loads((whole / "evaluation.json").read_text())
    assert (found["iteration"], found["attention"], found["eval_iters"]) == (40, "dense", 2)
    assert 0 < found["validation_loss"] < 1.5 * float(values[-1])
    assert (whole / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "40"


BAD_NVIDIA_SMI = """#!/bin/sh
gpus=8
[ "$(hostname)" != node4 ] || gpus=7
for gpu in $(seq $gpus); do echo "580.1, $([ "$(hostname)$gpu" = node35 ] && echo 3 || echo 0)"; done
"""
BAD_SCONTROL = """#!/bin/sh
[ "$1" = requeue ] && [ ! -e {note} ] && touch {note} && echo no controller && exit 1
exec {real} "$@"
"""


@pytest.mark.slow
def test_a_bad_node_is_named_and_requeues_have_a_limit(cluster: Slurm, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvidia-smi").write_text(BAD_NVIDIA_SMI)
    (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    trainer = tmp_path / "failing"  # the first start gains iterations, those after it do not
    checkpoints = tmp_path / "limited" / "checkpoints"
    trainer.write_text(f"#!/bin/sh\nmkdir -p {checkpoints}\necho 5 >{checkpoints}/latest_checkpointed_iteration.txt\nexit 3\n")
    trainer.chmod(0o755)
    (tmp_path / "bin" / "scontrol").write_text(BAD_SCONTROL.format(note=tmp_path / "asked", real=shutil.which("scontrol")))
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    failing = cluster_file(tmp_path, "MAX_REQUEUES=1", "PREFLIGHT=0", f"PYTHON={trainer}")
    limited = submit(cluster, tmp_path / "limited", "--check", "0", file=failing, bin=str(tmp_path / "bin"))
    others = []
    saves = f"mkdir {tmp_path}/late/checkpoints; echo 99999 >{tmp_path}/late/checkpoints/latest_checkpointed_iteration.txt"
    for name, does, more in (
        *(("refused", "exit 2", "PREFLIGHT=0"), ("unmet", "exit 75", "PREFLIGHT=1")),
        ("late", f"[ $RANK != 0 ] || {{ {saves}; exit 143; }}", "PREFLIGHT=0"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "python").write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name / "python").chmod(0o755)
        file = cluster_file(tmp_path / name, "MAX_REQUEUES=1", f"PYTHON={tmp_path}/{name}/python", more)
        others.append(submit(cluster, tmp_path / name, "--check", "0", file=file))

    fabric = tmp_path / "gpu.env"
    fabric.write_text("NODES=2\nGPUS_PER_NODE=8\nARCH=hopper\nEXCLUSIVE=0\nCPUS_PER_TASK=1\n")
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{cluster.environment['PATH']}"
    command = ["--cluster", str(fabric), "--recipe", "530m-1m", "--run", str(tmp_path / "bad"), "--check", "0"]
    command += ["--sbatch", "--nodelist=node[3-4]"]
    done = cluster.run(str(ROOT / "launch" / "submit.sh"), *command, "--", "--mock-data", PATH=path)
    assert done.returncode == 0, done.stderr
    bad = done.stdout.strip()

    assert cluster.wait(bad, 120)["JobState"] == "FAILED"
    text = log(tmp_path / "bad", bad)
    assert "preflight: node4: 7 GPUs, and the cluster file says GPUS_PER_NODE=8" in text
    assert "preflight: node3: GPU 4: 3 uncorrected ECC errors" in text
    assert "the pre-flight check failed" in text
    assert not (tmp_path / "bad" / "logs" / f"{bad}_0.log").exists()

    state = cluster.wait(limited, 120)
    assert (state["JobState"], state["Restarts"]) == ("FAILED", "2")
    text = log(tmp_path / "limited", limited)
    assert "MAX_REQUEUES=1 is reached" in text
    assert text.index("no controller") < text.index("requeued")
    for name, job, ends, says in zip(
        ("refused", "unmet", "late"),
        others,
        (("FAILED", "0"), ("FAILED", "1"), ("COMPLETED", "0")),
        ("the command line is refused", "did not meet for the pre-flight", "done: iteration 99999 is saved"),
        strict=True,
    ):
        state = cluster.wait(job, 120)
        assert (state["JobState"], state["Restarts"]) == ends
        assert says in log(tmp_path / name, job)


@pytest.mark.slow
def test_two_stages_train(cluster: Slurm, tmp_path: Path) -> None:
    """Stage 1, stage 2 and the evaluation of its checkpoint, on two nodes that share each sequence."""
    run, path = tmp_path / "chain", f"{Path(sys.executable).parent}:{cluster.environment['PATH']}"
    command = ["--cluster", str(cluster_file(tmp_path, "PREFLIGHT=0")), "--recipe", "cpu-test", "--run", str(run)]
    command += ["--stage1", "6", "--total", "10", "--eval-iters", "2", "--", *DATA]
    done = cluster.run(str(ROOT / "launch" / "two_stage.sh"), *command, PATH=path)
    assert done.returncode == 0, done.stderr
    jobs = re.findall(r": job (\d+)", done.stdout)
    assert cluster.wait(jobs[-1], 240)["JobState"] == "COMPLETED", "".join(log(run, job)[-2000:] for job in jobs)
    stages = [log(run, f"{job}_0") for job in jobs[:2]]
    assert [list(losses(stage)) for stage in stages] == [[*range(1, 7)], [*range(7, 11)]]
    assert all(f"{name} 256 tokens: " in stage for name, stage in zip(("lighthouse", "dense"), stages, strict=True))
    found = json.loads((run / "evaluation.json").read_text())
    assert (found["iteration"], found["attention"]) == (10, "dense")
    assert found["validation_loss"] < float(losses(stages[0])[1])


TRAINER = """#!/usr/bin/env bash
# in the place of Python: a run that reaches its --exit-interval or --train-iters, or an evaluation; each fails the first time
[[ $2 == megatron_lighthouse.pretrain_gpt ]] || exit 0
for ((i = 1; i <= $#; i++)); do
    case ${!i} in
        --save | --load) j=$((i + 1)) folder=${!j} ;;
        --exit-interval | --train-iters) j=$((i + 1)) target=${stop:-${!j}} && [[ ${!i} == --train-iters ]] || stop=${!j} ;;
        --attention) j=$((i + 1)) attention=${!j} ;;
        --skip-train) only=evaluation ;;
    esac
done
((RANK == 0)) || exit 0
[[ -e $folder ]] || { mkdir "$folder" && exit 3; }
if [[ -n $only ]]; then
    [[ -e $folder/tried ]] || { touch "$folder/tried" && exit 3; }
    reached=$(cat "$folder/latest_checkpointed_iteration.txt")
    echo " validation loss at iteration $reached on validation set | lm loss value: 2.5E+00 | lm loss PPL: 1.2E+01 | "
    exit
fi
echo "${stop:-$target}" >"$folder/latest_checkpointed_iteration.txt"
echo "$attention to ${stop:-$target}"
"""


def test_two_stages_and_their_evaluation(cluster: Slurm, tmp_path: Path) -> None:
    """Where each fails the first time; with a stand-in for Python, for training and evaluation themselves are as above."""
    trainer = tmp_path / "trainer"
    trainer.write_text(TRAINER)
    trainer.chmod(0o755)
    fake = cluster_file(tmp_path, "PREFLIGHT=0", f"PYTHON={trainer}")
    run = tmp_path / "chain"
    command = [str(ROOT / "launch" / "two_stage.sh"), "--cluster", str(fake), "--recipe", "cpu-test", "--run", str(run)]
    command += ["--stage1", "30", "--total", "40", "--eval-iters"]
    done = cluster.run(*command, "4", "--", "--mock-data")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^(.*): job", done.stdout, re.M) == [
        *("stage 1, to iteration 30", "stage 2, to iteration 40", "evaluation")
    ]
    first, second, last = re.findall(r": job (\d+)", done.stdout)
    again = cluster.run(*command, "4", "--", "--mock-data")
    assert (again.returncode, again.stdout) == (2, ""), again.stderr
    assert f"its job {second} (train) is queued or runs" in again.stderr

    assert cluster.wait(last, 120)["JobState"] == "COMPLETED"
    assert [cluster.state(job)["Restarts"] for job in (first, second, last)] == ["1", "0", "1"]
    assert "lighthouse to 30" in log(run, f"{first}_1")
    assert "dense to 40" in log(run, f"{second}_0")
    assert json.loads((run / "evaluation.json").read_text()) == {
        **{"iteration": 40, "attention": "dense", "seq_length": 256, "eval_iters": 4},
        **{"validation_loss": 2.5, "perplexity": 12.0},
    }
    for batches in ("4", "0"):
        done = cluster.run(*command, batches, "--", "--mock-data")
        assert "nothing to queue" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_a_scaling_array(cluster: Slurm, tmp_path: Path) -> None:
    file, study = cluster_file(tmp_path, "PREFLIGHT=0"), tmp_path / "study"
    points = "--check", "0", "--study", "CP=1:2 SEQ=256 ATTENTION=dense:lighthouse"
    job = submit(cluster, study, *points, file=file, data=(*DATA, "--train-iters", "5", "--global-batch-size", "2"))
    for task in range(4):
        state = cluster.wait(f"{job}_{task}")
        assert state["JobState"] == "COMPLETED", "\n".join(path.read_text()[-2000:] for path in study.glob("*/logs/*.log"))
    assert main(["scaling", str(study), "--out", str(study)]) == 0
    with (study / "scaling.csv").open() as table:
        rows = {row["run"]: row for row in csv.DictReader(table)}
    assert sorted(rows) == sorted(f"{attention}-256-cp{size}" for size in (1, 2) for attention in ("dense", "lighthouse"))
    for row in rows.values():
        assert (row["iterations"], row["gpus"]) == ("5", "2")
        assert float(row["tokens_s_gpu"]) == pytest.approx(2 * 256 / 2 / float(row["seconds_a_step"]), rel=1e-3)
    assert float(rows["dense-256-cp1"]["efficiency"]) == 1
    assert "names no device" in (study / "scaling.txt").read_text()
    for name in ("throughput.png", "efficiency.png"):
        assert (study / name).read_bytes().startswith(b"\x89PNG")
    info = json.loads((study / "lighthouse-256-cp2" / "run.json").read_text())
    assert (info["budget"], info["vocab"], info["global_batch"], info["recompute"]) == (8, 384, 2, "none")
    assert not list(study.glob("*/checkpoints"))
