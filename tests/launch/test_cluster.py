"""The launch scripts as they are, on an emulated Slurm: to completion, and through what ends jobs early."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from megatron_lighthouse.plots import read_scalars
from tests.launch import slurm
from tests.launch.slurm import Slurm

ROOT = Path(__file__).parents[2]
DATA = ("--text-data", str(ROOT / "LICENSE"))
ITERATION = re.compile(r"iteration +(\d+)/ .*lm loss: (\S+)")


def submit(cluster: Slurm, run: Path, *options: str, profile: Path | str = "cpu-test", data: tuple[str, ...] = DATA) -> str:
    """The number of the queued job."""
    path = f"{Path(sys.executable).parent}:{cluster.environment['PATH']}"
    command = ["--profile", str(profile), "--recipe", "cpu-test", "--run", str(run), *options]
    done = cluster.run(str(ROOT / "launch" / "submit.sh"), *command, "--", *data, PATH=path)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def profile(folder: Path, *lines: str) -> Path:
    """The CPU profile with some keys set otherwise."""
    file = folder / "profile.env"
    file.write_text((ROOT / "launch" / "profiles" / "cpu-test.env").read_text() + "\n".join(lines) + "\n")
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


def test_a_run_survives_a_dead_rank_and_the_time_limit(cluster: Slurm, tmp_path: Path) -> None:
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    iterations = ("--train-iters", "40", *DATA)
    hasty = profile(tmp_path, "TIME=1", "MAX_REQUEUES=6", "PREFLIGHT=0")
    job = submit(cluster, broken, "--check", "0", profile=hasty, data=iterations)

    def trains(restart: int) -> int | None:
        """The restart that trains beyond its first checkpoint, of this number or later."""
        logs = [number for number in range(restart, 7) if len(losses(log(broken, f"{job}_{number}"))) > 6]
        return logs[-1] if logs else None

    def everything() -> str:
        return "\n".join(path.read_text(errors="replace")[-2000:] for path in sorted((broken / "logs").iterdir()))

    wait_for(lambda: trains(0) is not None, 60, everything)
    os.kill(cluster.ranks()[1], signal.SIGKILL)
    killed = time.monotonic()
    wait_for(lambda: "the ranks ended with status" in log(broken, job), 30, everything)
    assert time.monotonic() - killed < 30
    dead = int(re.findall(r"ended with status (\d+)", log(broken, job))[0])
    assert dead, log(broken, job)

    # one that goes on is stopped until Slurm's warning waits for it; the uninterrupted run has the machine meanwhile
    restart = wait_for(lambda: trains(1), 90, everything)
    ranks = cluster.ranks()
    for process in ranks.values():
        os.kill(process, signal.SIGSTOP)
    other = submit(cluster, whole, data=iterations)
    end = rf"restart {restart}: .* status 0 at iteration (\d+)"

    def saved() -> list[str]:
        for process in ranks.values():
            slurm.go_on(process, signal.SIGTERM)
        return re.findall(end, log(broken, job))

    saved_at = wait_for(saved, 90, everything)
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


BAD_NVIDIA_SMI = """#!/bin/sh
gpus=8
[ "$(hostname)" != node4 ] || gpus=7
for gpu in $(seq $gpus); do echo "580.1, $([ "$(hostname)$gpu" = node35 ] && echo 3 || echo 0)"; done
"""


def test_a_bad_node_is_named_and_requeues_have_a_limit(cluster: Slurm, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvidia-smi").write_text(BAD_NVIDIA_SMI)
    (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    failing = profile(tmp_path, "MAX_REQUEUES=1", "PREFLIGHT=0", "PYTHON=false")
    limited = submit(cluster, tmp_path / "limited", "--check", "0", profile=failing)

    fabric = tmp_path / "gpu.env"
    fabric.write_text("NODES=2\nGPUS_PER_NODE=8\nARCH=hopper\n")
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{cluster.environment['PATH']}"
    command = ["--profile", str(fabric), "--recipe", "530m-1m", "--run", str(tmp_path / "bad"), "--check", "0"]
    command += ["--sbatch", "--nodelist=node[3-4]"]
    done = cluster.run(str(ROOT / "launch" / "submit.sh"), *command, "--", "--mock-data", PATH=path)
    assert done.returncode == 0, done.stderr
    bad = done.stdout.strip()

    assert cluster.wait(bad, 40)["JobState"] == "FAILED"
    text = log(tmp_path / "bad", bad)
    assert "preflight: node4: 7 GPUs, and the profile says GPUS_PER_NODE=8" in text
    assert "preflight: node3: GPU 4: 3 uncorrected ECC errors" in text
    assert "the pre-flight check failed" in text
    assert not (tmp_path / "bad" / "logs" / f"{bad}_0.log").exists()

    state = cluster.wait(limited, 40)
    assert (state["JobState"], state["Restarts"]) == ("FAILED", "1")
    assert "MAX_REQUEUES=1 is reached" in log(tmp_path / "limited", limited)


TRAINER = """#!/usr/bin/env bash
# in the place of Python: a run that reaches its --exit-interval or --train-iters, but fails the first time
[[ $2 == megatron_lighthouse.pretrain_gpt ]] || exit 0
for ((i = 1; i <= $#; i++)); do
    case ${!i} in
        --save) j=$((i + 1)) save=${!j} ;;
        --exit-interval | --train-iters) j=$((i + 1)) target=${stop:-${!j}} && [[ ${!i} == --train-iters ]] || stop=${!j} ;;
        --attention) j=$((i + 1)) attention=${!j} ;;
    esac
done
((RANK == 0)) || exit 0
[[ -e $save ]] || { mkdir "$save" && exit 3; }
echo "${stop:-$target}" >"$save/latest_checkpointed_iteration.txt"
echo "$attention to ${stop:-$target}"
"""


def test_two_stages_and_a_scaling_array(cluster: Slurm, tmp_path: Path) -> None:
    """Their Slurm side, with a stand-in for Python: training itself is the same script as above."""
    trainer = tmp_path / "trainer"
    trainer.write_text(TRAINER)
    trainer.chmod(0o755)
    fake = profile(tmp_path, "PREFLIGHT=0", f"PYTHON={trainer}")
    common = ["--profile", str(fake), "--recipe", "cpu-test", "--run"]
    stages = ["--stage1", "30", "--total", "40", "--", "--mock-data"]
    done = cluster.run(str(ROOT / "launch" / "two_stage.sh"), *common, str(tmp_path / "chain"), *stages)
    assert done.returncode == 0, done.stderr
    first, second = re.findall(r"stage \d: job (\d+)", done.stdout)

    array = ["--script", "scaling", "--sbatch", "--array=0-4 --export=ALL,CP=1:2,SEQ=256,ATTENTION=dense:lighthouse"]
    done = cluster.run(str(ROOT / "launch" / "submit.sh"), *array, *common, str(tmp_path / "study"), "--", "--mock-data")
    assert done.returncode == 0, done.stderr

    assert cluster.wait(second, 60)["JobState"] == "COMPLETED"
    assert cluster.state(first)["Restarts"] == "1"
    assert "lighthouse to 30" in log(tmp_path / "chain", f"{first}_1")
    assert "dense to 40" in log(tmp_path / "chain", f"{second}_0")
    done = cluster.run(str(ROOT / "launch" / "two_stage.sh"), *common, str(tmp_path / "chain"), *stages)
    assert "stage 1" not in done.stdout

    folders = [f"{attention}-256-cp{size}" for size in (1, 2) for attention in ("dense", "lighthouse")]
    found = {path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "study").glob("*/run.json")}
    assert sorted(found) == sorted(folders)
    assert found["lighthouse-256-cp2"] == {
        **{"attention": "lighthouse", "seq_length": 256, "context_parallel": 2},
        **{"gpus": 2, "recipe": "cpu-test"},
    }
