"""Traces that hold what no profiler should write: bad bytes, control characters, broken events, rows in no order."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from megatron_lighthouse.profiling import report
from tests.traces import check_by_hand, refused, torch_events, write_nsys, write_torch


@pytest.mark.parametrize("name", [b"aten::\xff\xfe", b"a\x01b\x00c", b"tab\tline\nend", "Größe".encode("latin-1")])
def test_a_name_of_any_bytes(name: bytes, tmp_path: Path) -> None:
    """A range may have been given any; the JSON that the profiler writes holds them as they are."""
    events = torch_events()
    events.append({"ph": "X", "cat": "cpu_op", "name": "HERE", "pid": 1, "tid": 5, "ts": 0, "dur": 1})
    path = write_torch(tmp_path / "t.json", events)
    path.write_bytes(path.read_bytes().replace(b"HERE", name))
    check_by_hand(report.ranks([path], None))


def test_a_byte_order_mark(tmp_path: Path) -> None:
    path = write_torch(tmp_path / "t.json", torch_events())
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    check_by_hand(report.ranks([path], None))


def test_an_unknown_step_is_printed_as_it_can_be(tmp_path: Path) -> None:
    events = torch_events()
    events.append(
        {"ph": "X", "cat": "user_annotation", "name": "lighthouse/\x1b\ud800x", "pid": 1, "tid": 10, "ts": 45, "dur": 20}
    )
    said = report.text(report.ranks([write_torch(tmp_path / "t.json", events)], None))
    assert "��x" in said
    assert said.replace("\n", "").isprintable()


def test_json_that_is_broken_in_its_middle_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_torch(tmp_path / "t.json", torch_events())
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"flash_fwd_kernel", b'say "flash"'))
    error = refused(capsys, path)
    assert "no valid JSON" in error
    assert 'say "flash' in error
    assert "cut short" not in error
    for length in (len(whole) - 1, len(whole) // 2, len(whole) // 3, 5):
        path.write_bytes(whole[:length])
        assert f"{path} is cut short" in refused(capsys, path), length
    path.write_bytes(b"")
    assert f"{path} is empty" in refused(capsys, path)


@pytest.mark.parametrize(
    "change",
    [
        {"dur": -5},
        {"dur": float("nan")},
        {"dur": "5"},
        {"ts": float("inf")},
        {"ts": None},
        {"name": 3},
        {"pid": None},
        {"args": [1]},
        {"args": {"correlation": [1]}},
    ],
    ids=str,
)
def test_events_without_a_name_or_a_time_are_left_out_with_a_word(change: dict[str, Any], tmp_path: Path) -> None:
    events, sdpa = torch_events(), next(e for e in torch_events() if e["name"] == "cudnn_sdpa")
    found = report.ranks([write_torch(tmp_path / "t.json", [*events, sdpa | change])], None)
    check_by_hand(found)
    assert "1 pieces of GPU work have no time, or end before they begin: they are left out" in report.text(found)


def test_operators_without_a_time_are_left_out_with_a_word(tmp_path: Path) -> None:
    events = [e for e in torch_events() if not e["cat"].startswith(("gpu", "kernel"))]
    whole, broken = (
        report.ranks([write_torch(tmp_path / name, kept)], None)
        for name, kept in (("a.json", events), ("b.json", [*events, {**events[-1], "cat": "cpu_op", "dur": -3}]))
    )
    assert broken[0].times == whole[0].times
    assert "1 operators and ranges have no name or time" in report.text(broken)


def test_work_without_any_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = [e | {"dur": 0} if e["cat"].startswith(("gpu", "kernel")) else e for e in torch_events()]
    assert "takes no time" in refused(capsys, write_torch(tmp_path / "t.json", events))


def test_a_trace_that_is_given_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_torch(tmp_path / "t.json", torch_events())
    assert f"{path} is given twice" in refused(capsys, path, tmp_path / "." / "t.json")


def changed(path: Path, *statements: str) -> Path:
    database = sqlite3.connect(path)
    for statement in statements:
        database.execute(statement)
    database.commit()
    database.close()
    return path


@pytest.mark.parametrize(
    "tables", [["NVTX_EVENTS"], ["NVTX_EVENTS", "CUPTI_ACTIVITY_KIND_KERNEL", "CUPTI_ACTIVITY_KIND_RUNTIME", "StringIds"]]
)
@pytest.mark.parametrize("number", ["_V2", "_V3", "_V10"])
def test_tables_with_a_number(tables: list[str], number: str, tmp_path: Path) -> None:
    path = changed(write_nsys(tmp_path / "a.sqlite"), *(f"ALTER TABLE {t} RENAME TO {t}{number}" for t in tables))
    check_by_hand(report.ranks([path], 2))


def test_of_several_tables_the_latest_with_rows(tmp_path: Path) -> None:
    path = changed(
        write_nsys(tmp_path / "a.sqlite"),
        "ALTER TABLE NVTX_EVENTS RENAME TO NVTX_EVENTS_V2",
        *(f"CREATE TABLE NVTX_EVENTS{number} AS SELECT * FROM NVTX_EVENTS_V2 LIMIT 0" for number in ("", "_V3")),
    )
    check_by_hand(report.ranks([path], 2))
    changed(path, "ALTER TABLE NVTX_EVENTS_V2 RENAME TO old", "CREATE VIEW NVTX_EVENTS_V4 AS SELECT * FROM old")
    check_by_hand(report.ranks([path], 2))


def test_rows_in_any_order(tmp_path: Path) -> None:
    """As Nsight Systems 2025.6 may write them; of two GPUs, whose order in the report is theirs."""
    kernels = "CUPTI_ACTIVITY_KIND_KERNEL"
    columns = "start, end + 1000, 1, contextId, streamId, correlationId, globalPid, demangledName, shortName"
    path = changed(write_nsys(tmp_path / "a.sqlite"), f"INSERT INTO {kernels} SELECT {columns} FROM {kernels}")
    names = [name for (name,) in sqlite3.connect(path).execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    texts = [report.text(report.ranks([path], 2))]
    for order in ("rowid DESC", "rowid * 7919 % 101", "rowid * 104729 % 53, rowid DESC"):
        for name in names:
            changed(path, f"CREATE TABLE t AS SELECT * FROM {name} ORDER BY {order}", f"DROP TABLE {name}")
            changed(path, f"ALTER TABLE t RENAME TO {name}")
        texts.append(report.text(report.ranks([path], 2)))
    assert "GPU 0" in texts[0]
    assert texts[1:] == texts[:1] * 3


def test_a_database_with_bad_bytes_and_times(tmp_path: Path) -> None:
    path = changed(
        write_nsys(tmp_path / "a.sqlite"),
        "INSERT INTO StringIds VALUES (9999, CAST(x'ff41fe' AS TEXT))",
        "INSERT INTO NVTX_EVENTS VALUES (0, 5, 59, NULL, 9999, 1)",
        "INSERT INTO NVTX_EVENTS VALUES (0, 5, 59, CAST(x'c328' AS TEXT), NULL, 1)",
        "INSERT INTO NVTX_EVENTS VALUES (50, 5, 59, 'lighthouse/score', NULL, 1)",
        "INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (NULL, 1, 5, 999, 0)",
        "INSERT INTO CUPTI_ACTIVITY_KIND_MEMSET VALUES (9, 5, 0, 1, 7, 9999, 1291845632)",
    )
    found = report.ranks([path], 2)
    check_by_hand(found)
    assert "1 pieces of GPU work have no time" in report.text(found)
