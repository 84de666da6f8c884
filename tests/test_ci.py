"""What CI does on a new machine: installs what the tests need, and takes no skip for a pass."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

SKIPS = """
import pytest

@pytest.fixture
def cluster():
    pytest.skip("no Slurm")

def test_with_a_cluster(cluster):
    pass

@pytest.mark.skipif(True, reason="no such machine")
def test_elsewhere():
    pass

@pytest.mark.gpu
@pytest.mark.skipif(True, reason="needs a CUDA device")
def test_on_a_gpu():
    pass

@pytest.mark.xfail
def test_a_known_fault():
    assert False
"""


@pytest.mark.parametrize(
    ("options", "status", "says"),
    [((), 0, "3 skipped, 1 xfailed"), (("--no-skips",), 1, "1 skipped, 1 xfailed, 2 errors")],
    ids=["make test", "CI"],
)
def test_only_a_missing_gpu_may_skip(
    options: tuple[str, ...], status: int, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / f"test_skips_{len(options)}.py"  # a module of its own
    file.write_text(SKIPS)
    settings = f"-c {ROOT}/pyproject.toml --rootdir {tmp_path} -p tests.conftest -p no:cacheprovider".split()
    ended = pytest.main([*settings, *options, "--capture=no", str(file)])
    said = capsys.readouterr().out
    assert ended == status, said
    assert said.splitlines()[-1].startswith(says)
    assert f"{file.name}:15: needs a CUDA device" in said


APT = """#!/bin/sh
echo "apt-get $DEBIAN_FRONTEND $*" >>calls
"""
MAKE = """#!/bin/sh
echo "make $*" >>calls
[ "$1" != test ] || { echo "9 passed, 4 skipped in 1.00s"; exit $(cat status); }
"""


def ci(folder: Path, packages: str, status: int = 0) -> tuple[int, str, list[str]]:
    """.ci/run among stand-ins for all that it starts: its status, what it prints, and what it called."""
    (folder / ".ci").mkdir(exist_ok=True)
    shutil.copy(ROOT / ".ci" / "run", folder / ".ci")
    (folder / "calls").unlink(missing_ok=True)
    (folder / "status").write_text(str(status))
    programs = {"apt-get": APT, "make": MAKE, "id": "#!/bin/sh\necho 0\n", ".venv/bin/python": f"#!/bin/sh\necho {packages}\n"}
    for name, text in programs.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", ".ci/run"], env=environment, cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout, (folder / "calls").read_text().splitlines()


def test_ci_installs_what_is_absent_and_runs_all_tests(tmp_path: Path) -> None:
    tests = ["make test ARGS=--no-skips", "make test-all ARGS=--no-skips -m slow"]
    status, said, calls = ci(tmp_path, "slurmctld munge")
    assert status == 0
    assert said.splitlines()[-1] == "make test before that: 9 passed, 4 skipped in 1.00s"
    installed = "apt-get noninteractive install -y -qq --no-install-recommends slurmctld munge"
    assert calls == ["make .venv/.installed", "apt-get noninteractive update -qq", installed, *tests]
    assert ci(tmp_path, "")[2] == ["make .venv/.installed", *tests]
    status, _, calls = ci(tmp_path, "", status=2)
    assert (status, calls) == (2, ["make .venv/.installed", tests[0]])
