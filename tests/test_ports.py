"""The ports of runs in tests, and of a rank alone, which no other process can take before it listens."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from megatron_lighthouse.launch.torchrun import one_rank
from tests import ports
from tests.launch.scripts import ROOT


def test_a_port_is_none_that_is_handed_out() -> None:
    found = {ports.free_port() for _ in range(20)}
    assert len(found) > 1
    assert not found & {*ports.handed_out()}
    with socket.socket() as asks_for_any:
        asks_for_any.bind(("localhost", 0))
        assert asks_for_any.getsockname()[1] in ports.handed_out()


def test_a_port_that_is_taken_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free, taken = ports.free_port(), ports.free_port()
    others = {*range(ports.FIRST, 65536)} - {free, taken}
    monkeypatch.setattr(ports, "handed_out", lambda: others)
    with socket.socket() as listens:
        listens.bind(("", taken))
        listens.listen()
        assert [ports.free_port() for _ in range(5)] == [free] * 5


def test_where_all_are_handed_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "range").write_text("1024\t65535\n")
    monkeypatch.setattr(ports, "HANDED_OUT", tmp_path / "range")
    assert ports.free_port() in range(1024, 65536)


def test_a_rank_alone_is_given_its_port() -> None:
    assert one_rank()["MASTER_PORT"] == "0"


def test_no_port_is_looked_for_elsewhere() -> None:
    folders = ("megatron_lighthouse", "benchmarks", "experiments", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    looks = [path.name for path in files if 'bind(("localhost", 0)' in path.read_text()]
    assert looks == [Path(__file__).name]
