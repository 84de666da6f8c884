"""Ranks on this machine alone, where another launcher has set its variables for more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from megatron_lighthouse.launch.torchrun import own_environment, torchrun
from megatron_lighthouse.mcore.command_line import flags
from megatron_lighthouse.mcore.command_line.entry import with_all_arguments
from megatron_lighthouse.recipe import evaluate, two_stage
from megatron_lighthouse.recipe.presets import preset_for
from tests.launch.scripts import ROOT

PYTORCHJOB = {"PET_NNODES": "2", "PET_NODE_RANK": "0", "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "localhost"} | {
    **{"PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": "localhost:1", "PET_RDZV_ID": "job", "PET_MAX_RESTARTS": "3"},
    **{"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", "PYTHON_EXEC": "/nowhere/python"},
}
"""As Kubernetes' PyTorchJob sets them in the first of two pods, but for ports on which nobody listens."""


RANK = """import os
os.write(1, "{RANK} {LOCAL_RANK} {WORLD_SIZE}\\n".format(**os.environ).encode())
"""


def test_it_waits_for_no_other_node(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    own = own_environment({**os.environ, **PYTORCHJOB, "OMP_NUM_THREADS": "1"})
    done = subprocess.run(
        [*torchrun(2), str(tmp_path / "rank.py")],
        env=own,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["0 0 2", "1 1 2"]


def test_make_train_starts_it_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PYTORCHJOB.items():
        monkeypatch.setenv(name, value)
    preset = preset_for(0)
    assert not [name for name in two_stage._environment(preset) if name.startswith("PET_")]
    command = two_stage._command(preset, ["--attention", "dense"])
    assert command[: len(torchrun(1))] == torchrun(preset.processes)


def test_no_flag_of_ours_may_be_one_of_torchruns_cut_short() -> None:
    """The argparse of Python 3.12.1 refuses it wherever it stands, if it begins two names of torchrun's, as --run once did."""
    names = get_args_parser()._option_string_actions
    ours = {**flags.parser(with_all_arguments)._option_string_actions, **evaluate._parser()._option_string_actions}
    assert "--run-folder" in ours
    begun = {flag: [name for name in names if name.startswith(flag) and flag not in names] for flag in ours}
    assert not {flag: found for flag, found in begun.items() if len(found) > 1}


def test_every_torchrun_is_that_one() -> None:
    folders = ("megatron_lighthouse", "benchmarks", "experiments", "tests/mcore")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert [path.name for path in files if "torch.distributed.run" in path.read_text()] == ["torchrun.py"]
    assert Path(torchrun(1)[0]) == Path(sys.executable)
