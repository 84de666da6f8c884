"""Which endings of a job are requeued: what another start may end otherwise, and of a study the one point that failed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.launch.scripts import LAUNCH, common
from tests.launch.slurm import Slurm
from tests.launch.test_cluster import cluster_file, log, submit

START = """
source "$LAUNCH/requeue.sh"
began=$1 status=$2 logged=$3 iteration=$4 MAX_REQUEUES=$5 restarts=$6
mkdir -p "$RUN/checkpoints" "$RUN/logs"
log=$RUN/logs/7_$restarts.log
echo " iteration $logged/ 40 | lm loss: 2.0 |
launch: rank 1 ended with status $status" >"$log"
echo "$iteration" >"$RUN/checkpoints/latest_checkpointed_iteration.txt"
scontrol() { echo "asked: $*"; }
sleep() { :; }
status=$(first_status "$log" 137)
(refuse_to_repeat "$status" "$log"; requeue "$status" "$log") || echo "ended with $?"
"""


@pytest.mark.parametrize(
    ("starts", "says"),
    [
        # of each start: where it began, its status, the iteration it logged last, and its checkpoint's
        ([(0, 1, 3, 0), (0, 1, 3, 0)], "status 1 twice in a row at the same place"),
        ([(0, 137, 3, 0), (0, 137, 3, 0)], "status 137 twice in a row"),
        ([(0, 1, 13, 10), (10, 1, 13, 10), (10, 1, 13, 10)], "status 1 twice in a row"),
        ([(0, 1, 3, 0), (0, 1, 4, 0), (0, 1, 5, 0)], ""),  # a GPU that fails now and then
        ([(0, 1, 3, 0), (0, 134, 3, 0), (0, 1, 3, 0)], ""),
        ([(0, 1, 13, 10), (10, 1, 13, 20), (20, 1, 13, 30)], ""),
        ([(0, 143, 3, 0), (0, 143, 3, 0), (0, 143, 3, 0)], ""),  # it was told to
        ([(0, 1, n, 0) for n in range(6)], "MAX_REQUEUES=5 is reached"),
        *(
            ([(0, status, 3, 0)], says)
            for status, says in ((2, "the command line is refused"), (127, "a program is not there"))
        ),
        ([(0, 16, 3, 2)], "a loss, a gradient or a weight is not finite"),
        ([(0, 17, 3, 0), (0, 17, 3, 0)], "status 17 twice in a row"),  # computed again the result was another: a GPU that errs
    ],
)
def test_what_would_repeat_is_not_requeued(starts: list[tuple[int, int, int, int]], says: str, tmp_path: Path) -> None:
    own = {"RUN": str(tmp_path), "SLURM_JOB_ID": "7"}
    for restart, start in enumerate(starts):
        words = [*map(str, start), "5", str(restart)]
        said = common(START, *words, **own)
        if says and restart == len(starts) - 1:
            assert says in said
            assert "ot requeued" in said
            assert says.startswith("MAX") or f"{tmp_path}/logs/7_{restart}.log" in said
        else:
            assert "asked: requeue 7\n" in said, said
        assert f"ended with {start[1]}\n" in said


def test_a_rank_that_would_fail_again_speaks_for_all(tmp_path: Path) -> None:
    """Before those that die for it, and before srun's own status."""
    log = tmp_path / "log"
    script = 'source "$LAUNCH/requeue.sh"; first_status "$1" 137'
    assert common(script, str(log)) == "137\n"
    for lines, status in (
        (["launch: rank 3 ended with status 1", "launch: rank 0 ended with status 143"], "1"),
        (["launch: rank 3 ended with status 1", "launch: rank 0 ended with status 16"], "16"),
        (["launch: rank 3 ended with status 1", "launch: rank 0 ended with status 26"], "1"),
    ):
        log.write_text("\n".join(lines) + "\n")
        assert common(script, str(log)) == f"{status}\n"


POINT = """#!/usr/bin/env bash
# in the place of Python: a point that takes its time, the last of which fails once
[[ $2 == megatron_lighthouse.pretrain_gpt && $RANK == 0 ]] || exit 0
for ((i = 1; i <= $#; i++)); do [[ ${!i} != --tensorboard-dir ]] || { j=$((i + 1)) && folder=$(dirname "${!j}"); }; done
echo started >>"$folder/starts"
[[ $folder != */lighthouse-256-cp2 || -e $folder/failed ]] || { sleep 1 && touch "$folder/failed" && exit 3; }
echo " iteration        5/       5 | lm loss: 2.0E+00 |"
"""


def test_a_study_requeues_the_point_that_failed(cluster: Slurm, tmp_path: Path) -> None:
    """The array's last point has the array's number, and those before it have ended. Without any variable of this shell."""
    (tmp_path / "python").write_text(POINT)
    (tmp_path / "python").chmod(0o755)
    file, study = cluster_file(tmp_path, "PREFLIGHT=0", f"PYTHON={tmp_path}/python"), tmp_path / "study"
    points = ["--study", "CP=1:2 SEQ=256 ATTENTION=dense:lighthouse", "--check", "0"]
    job = submit(cluster, study, *points, file=file, data=("--mock-data", "--train-iters", "5"))
    again = cluster.run(
        *(str(LAUNCH / "submit.sh"), "--cluster", str(file), "--recipe", "cpu-test", "--run", str(study), *points),
        *("--", "--mock-data", "--train-iters", "5"),
    )
    assert (again.returncode, again.stdout) == (2, "")
    assert re.search(rf"its job {job}_\d \(point\) is queued or runs", again.stderr)
    ends = [cluster.wait(f"{job}_{task}") for task in (3, 2, 1, 0)]
    assert [(state["JobState"], state["Restarts"]) for state in ends] == [("COMPLETED", "1")] + [("COMPLETED", "0")] * 3
    starts = {path.parent.name: path.read_text().count("started") for path in study.glob("*/starts")}
    assert starts == {"dense-256-cp1": 1, "lighthouse-256-cp1": 1, "dense-256-cp2": 1, "lighthouse-256-cp2": 2}
    assert f"job {job}_3, restart 0: requeued" in log(study, f"{job}_3")
    assert (study / "lighthouse-256-cp2" / "logs" / f"{job}_3_1.log").exists()


KNOWS = """#!/usr/bin/env bash
# in the place of Python: notes what the pre-flight check and the ranks are given
folder=$(dirname "$0")
values="${MASTER_PORT:-none} ${LIGHTHOUSE_NODES:-none} ${NCCL_IB_TC:-none} ${RANK:-none} ${SLURM_RESTART_COUNT:-0}"
echo "$2 $values" >>"$folder/noted"
[[ $2 == *pretrain_gpt ]] || exit 0
mkdir -p "$folder/run/checkpoints"
echo 20 >"$folder/run/checkpoints/latest_checkpointed_iteration.txt"
"""


@pytest.mark.parametrize("exports", ["NONE", "ALL"])
def test_a_job_does_not_need_the_environment_of_submit(exports: str, cluster: Slurm, tmp_path: Path) -> None:
    """Many sites export nothing; and inside an allocation its restarts and array are not the job's."""
    (tmp_path / "python").write_text(KNOWS)
    (tmp_path / "python").chmod(0o755)
    file = cluster_file(tmp_path, "NCCL_IB_TC=106")
    allocation = {"SLURM_JOB_ID": "99", "SLURM_RESTART_COUNT": "4", "SLURM_ARRAY_JOB_ID": "98", "SLURM_ARRAY_TASK_ID": "3"}
    done = cluster.run(
        *(str(LAUNCH / "submit.sh"), "--cluster", str(file), "--recipe", "cpu-test", "--run", str(tmp_path / "run")),
        *("--check", "0", "--", "--mock-data"),
        **{"SBATCH_EXPORT": exports, "PYTHON": str(tmp_path / "python"), "NCCL_DEBUG": "WARN", **allocation},
    )
    assert done.returncode == 0, done.stderr
    said = re.search(r"launch: --export=NONE keeps this shell's .*\bNCCL_DEBUG\b.* from the job", done.stderr)
    assert bool(said) == (exports == "NONE"), done.stderr
    job = done.stdout.strip()
    assert cluster.wait(job)["JobState"] == "COMPLETED", log(tmp_path / "run", job)
    noted = [line.split() for line in (tmp_path / "noted").read_text().splitlines()]
    assert sorted((line[0].rsplit(".", 1)[1], line[-2]) for line in noted) == [
        *(("preflight", "none"), ("preflight", "none"), ("pretrain_gpt", "0"), ("pretrain_gpt", "1"))
    ]
    assert all(line[1].isdigit() and line[2].startswith("node") and line[-3] == "106" and line[-1] == "0" for line in noted)
