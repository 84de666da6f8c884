"""`benchmarks/session.py`: what hangs, fails or has no time takes none from the others, and the same command goes on."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_lighthouse.launch.torchrun import ROOT

BENCHMARKS = str(ROOT / "benchmarks")
HANGS = (
    "import subprocess as s,sys; s.Popen([sys.executable,'-c','import time; time.sleep(999)'],start_new_session=True).wait()"
)
LEAVES = "import subprocess as s,sys; s.Popen([sys.executable,'-c','import time; time.sleep(998)'],start_new_session=True)"
TABLE = "open('{out}/table.csv','w').write('1'); open('{out}/weights.pt','w').write('1')"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("session")


def case(script: Any, name: str, code: str, **more: Any) -> Any:
    return script.Case(name, name, f'-c "{code}"', **{"gpus": 0, "least": 0, **more})


def run(script: Any, tmp_path: Path, cases: Sequence[Any], *words: str, within: float = 60) -> int:
    """The status of a session of these, for which no process is a child that it did not start."""
    found: int = script.main(
        cases, ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--within", str(within), *words]
    )
    return found


def states(tmp_path: Path) -> dict[str, str]:
    found = json.loads((tmp_path / "out" / "session.json").read_text())
    return {name: one["status"] for name, one in found.items()}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, script: Any) -> None:
    """This process has children that are no orphans, and adopts none: the sessions of the tests that follow are processes."""
    monkeypatch.setattr(script, "adopt", lambda: None)
    monkeypatch.setattr(script, "end_orphans", lambda known: None)


def sleeping(seconds: int) -> list[psutil.Process]:
    return [
        one for one in psutil.process_iter(["cmdline"]) if f"import time; time.sleep({seconds})" in (one.info["cmdline"] or [])
    ]


def test_one_that_hangs_and_one_that_fails(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [
        case(script, "hangs", HANGS.replace("999", "9991"), limit=2),
        case(script, "fails", "print('why'); raise SystemExit(3)"),
        case(script, "writes", TABLE),
    ]
    assert run(script, tmp_path, cases) == 1
    assert states(tmp_path) == {"hangs": "over its limit", "fails": "failed: status 3", "writes": "done"}
    assert not sleeping(9991)
    said = capsys.readouterr().out
    assert "fails: failed: status 3 after" in said
    assert "why" in said
    assert (tmp_path / "out" / "writes" / "table.csv").read_text() == "1"
    assert not (tmp_path / "out" / "writes" / "weights.pt").exists()
    assert run(script, tmp_path, cases) == 1
    assert "after" not in capsys.readouterr().out  # nothing ran again
    run(script, tmp_path, cases, "--again", "fails")
    assert "fails: failed" in capsys.readouterr().out


def test_what_is_cut_off_goes_on(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marks = "import os,sys,time; there=os.path.exists('{out}/1'); open('{out}/1','w'); sys.exit(0 if there else %s)"
    cases = [
        case(script, "saves", marks % 75),
        case(script, "late", marks % "time.sleep(60)"),
        case(script, "long", "pass", least=1000),
    ]
    assert run(script, tmp_path, cases, within=8) == 75
    assert states(tmp_path) == {"saves": "cut off", "late": "cut off"}
    said = capsys.readouterr().out
    assert "long: not begun: it is worth 1000 s" in said
    assert "0 of 3 done, left: saves late long" in said
    assert run(script, tmp_path, [*cases[:2], case(script, "long", "pass")]) == 0
    assert set(states(tmp_path).values()) == {"done"}


def test_gpus_are_shared_out(script: Any, tmp_path: Path) -> None:
    notes = (
        f"import os,time; f=open('{tmp_path}/%s','w'); f.write(os.environ['CUDA_VISIBLE_DEVICES']); f.close(); time.sleep(%s)"
    )
    cases = [
        case(script, "one", notes % ("one", 1), gpus=1),
        case(script, "other", notes % ("other", 0), gpus=1),
        case(script, "both", f"import os; assert os.path.exists('{tmp_path}/one'); " + notes % ("both", 0), gpus=2),
        case(script, "many", "raise SystemExit(1)", gpus=4),
        case(script, "needy", "raise SystemExit(1)", needs="NOT_THERE_EVER"),
        case(script, "after", "import sys; sys.exit()", after="both"),
        case(script, "never", "raise SystemExit(1)", after="many"),
    ]
    assert run(script, tmp_path, cases) == 0
    assert [(tmp_path / name).read_text() for name in ("one", "other", "both")] == ["0", "1", "0,1"]
    assert states(tmp_path).keys() == {"one", "other", "both", "after"}


def test_cases_may_share_a_table(script: Any, tmp_path: Path) -> None:
    adds = "open('{out}/table.csv','a').write('%s')"
    cases = [case(script, name, adds % name, table="both") for name in ("first", "second")]
    assert run(script, tmp_path, [*cases, case(script, "other", TABLE)], "--cases", "[fs]*") == 0
    assert (tmp_path / "out" / "both" / "table.csv").read_text() == "firstsecond"
    assert states(tmp_path).keys() == {"first", "second"}


def test_a_case_that_is_not_there(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(script, tmp_path, [case(script, "one", TABLE)], "--cases", "one", "tw*")
    assert "--cases tw*: no such case" in capsys.readouterr().err


def session_of(code: str, tmp_path: Path) -> subprocess.Popen[bytes]:
    """A session with one fake case, as a process."""
    words = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--within", "60"]
    case = f"session.Case('one', 'one', '-c \"' + {code!r} + '\"', gpus=0, least=0)"
    script = f"import sys; sys.path.insert(0, {BENCHMARKS!r}); import session; sys.exit(session.main([{case}], {words!r}))"
    return subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_what_a_case_leaves_behind_is_ended(tmp_path: Path) -> None:
    assert session_of(LEAVES.replace("998", "9981"), tmp_path).wait(30) == 0
    assert not sleeping(9981)


def test_a_session_that_is_told_to_end_ends_all(tmp_path: Path) -> None:
    process = session_of(HANGS.replace("999", "9992"), tmp_path)
    until = time.monotonic() + 30
    while not sleeping(9992) and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert not sleeping(9992)
    assert not (tmp_path / "out" / "session.json").exists()


def test_cases_name_scripts_and_places_that_are_there(script: Any) -> None:
    places = {"out": "out", "work": "work", "within": 1}
    assert len({one.name for one in script.CASES}) == len(script.CASES)
    for one in script.CASES:
        first = one.words.format(**places).split()[0]
        assert first == "-m" or (ROOT / first).is_file()
        assert one.limit > one.least > script.ENDING
        assert one.after in ("", *(other.name for other in script.CASES))
        assert one.tiny, one.name
