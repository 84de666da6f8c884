"""Profiles: tables that were added up by hand, and a real trace of the reference steps on a CPU."""

from __future__ import annotations

import csv
import gzip
import json
import re
import sqlite3
from collections import Counter
from pathlib import Path

import pytest
import torch

from megatron_lighthouse import LighthouseConfig, lighthouse_attention
from megatron_lighthouse.profiling import report
from megatron_lighthouse.profiling.__main__ import main
from megatron_lighthouse.profiling.names import (
    BETWEEN,
    IN_BACKWARD,
    NODES,
    OF_ANY_LAYER,
    REST,
    STEPS,
    kernel_mark,
    range_mark,
)
from megatron_lighthouse.profiling.spans import length, union
from megatron_lighthouse.profiling.threads import Range, Thread
from tests.traces import BY_HAND, NODE, check_by_hand, refused, torch_events, write_nsys, write_torch

ROOT = Path(__file__).parents[1]


def test_a_torch_trace_is_added_up_as_by_hand(tmp_path: Path) -> None:
    path = write_torch(tmp_path / "rank-3.json.gz", torch_events(), distributedInfo={"rank": 3})
    found = report.ranks([path], None)
    check_by_hand(found)
    assert found[0].profile.name == "rank 3"


@pytest.mark.parametrize("old", [False, True])
def test_an_export_of_nsight_systems_is_added_up_as_by_hand(tmp_path: Path, old: bool) -> None:
    check_by_hand(report.ranks([write_nsys(tmp_path / "a.sqlite", old=old)], 2))


def test_a_trace_of_one_process_may_say_null_for_its_rank(tmp_path: Path) -> None:
    found = report.ranks([write_torch(tmp_path / "one.json", torch_events(), distributedInfo=None)], None)
    check_by_hand(found)
    assert found[0].profile.name == "one.json"


def test_without_autograds_ranges_the_thread_tells_backward(tmp_path: Path) -> None:
    """As where somebody profiles without `emit_nvtx`: our ranges are all there is, and what else is recomputed is not known."""
    (rank,) = report.ranks([write_nsys(tmp_path / "a.sqlite", engine_ranges=False)], 2)
    expected = {**BY_HAND, (REST, "backward"): BY_HAND[REST, "backward"] + BY_HAND[REST, "recompute"]}
    del expected[REST, "recompute"]
    assert rank.times.rows == pytest.approx({key: ms / 2 for key, ms in expected.items()})


def test_the_table_says_what_the_numbers_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_torch(tmp_path / "t.json", torch_events())
    assert main(["report", str(path), "--csv", str(tmp_path / "t.csv"), "--png", str(tmp_path / "t.png")]) == 0
    said = capsys.readouterr().out
    cells = {line[:40].strip(): line[40:].split() for line in said.splitlines() if len(line) > 40}
    assert "pool: fused into gather and score" in said
    assert REST in said
    assert "over 2 profiled" in said
    assert cells["gather"] == ["1.500", "-", "3.500", "5.000", "10.0%"]
    assert cells["communication"] == ["2.500", "-", "5.000", "7.500", "15.0%"]
    assert cells["of it not hidden"] == ["1.500", "-", "1.500", "3.000", "6.0%"]
    assert cells["less what ran at the same time"] == ["-5.000", "-10.0%"]
    assert cells["idle"] == ["4.000", "8.0%"]
    assert cells["wall"] == ["50.000", "100.0%"]
    with (tmp_path / "t.csv").open() as file:
        rows = {(row["step"], row["direction"]): float(row["ms_per_iteration"]) for row in csv.DictReader(file)}
    assert rows["attend", "backward"] == pytest.approx(4.5)
    assert rows["idle", "all"] == pytest.approx(4)
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_the_slowest_of_several_ranks_has_most_work_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rank 1 ends with rank 0, but its first scatter takes 6 ms more of 100: 5 of them from the time in which it was idle."""
    slow = torch_events()
    next(event for event in slow if event["name"] == "lighthouse_scatter_forward")["dur"] += 6000
    paths = [
        write_torch(tmp_path / f"{rank}.json", events, distributedInfo={"rank": rank})
        for rank, events in enumerate([torch_events(), slow])
    ]
    assert main(["report", *map(str, paths)]) == 0
    said = capsys.readouterr().out
    assert "mean of 2 ranks" in said
    assert "slowest: rank 1, 46.000 ms of its own work, 2.8% over the mean" in said
    rows = {line[:6]: line.split()[2:] for line in said.splitlines() if line.startswith("rank ")}
    # in 0..100 ms all but what is not hidden and idle; one of the 3 ms not hidden is a fill's
    assert rows["rank 0"] == ["50.000", "43.500", "7.500", "3.000", "4.000"]
    assert rows["rank 1"] == ["50.000", "46.000", "7.500", "3.000", "1.500"]
    scatter = next(line for line in said.splitlines() if line.startswith("scatter"))
    assert scatter.split()[1:] == ["4.000", "2.500", "3.000", "9.500", "19.0%"]


def test_work_whose_launch_is_missing_counts_by_its_stream(tmp_path: Path) -> None:
    events = [event for event in torch_events() if not event["cat"].startswith("cuda_")]
    sdpa = next(event for event in events if event["name"] == "cudnn_sdpa")
    events.append({**sdpa, "cat": "gpu_user_annotation", "name": "lighthouse/attend", "args": {}})
    (rank,) = report.ranks([write_torch(tmp_path / "t.json", events)], None)
    assert rank.times.rows["attend", "forward"] == pytest.approx(1.5)
    assert rank.times.rows["scatter", "backward"] == pytest.approx(3)  # by name alone
    assert "23 of 23" in report.text([rank])


def test_a_real_trace_shows_every_step_both_ways(tmp_path: Path) -> None:
    config = LighthouseConfig(levels=3, pooling=2, budget=8, tile_budget=8, steps="reference")
    query, key, value = (torch.randn(128, 1, 2, 8, requires_grad=True) for _ in range(3))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        lighthouse_attention(query, key, value, config).sum().backward()
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    (rank,) = report.ranks([tmp_path / "trace.json"], 1)
    seen, times = {key for key, ms in rank.times.rows.items() if ms > 0}, rank.times
    assert {row for row, direction in seen if direction == "forward"} >= set(STEPS) - {"pool"}
    assert {row for row, direction in seen if direction == "backward"} >= {"gather", "attend", "scatter"}
    assert not any(direction == "recompute" or (row, direction) == ("score", "backward") for row, direction in seen)
    # what torch itself adds up: each operator's own time
    own = sum(event.self_cpu_time_total for event in profile.key_averages() if not event.is_user_annotation) / 1000
    assert sum(times.rows.values()) == pytest.approx(own, rel=0.1)
    # whatever is not ours is little: sum, and views
    pieces = Counter(span.row for span in rank.profile.spans if span.direction == "forward")
    assert 0 < pieces[REST] < 0.05 * sum(pieces[step] for step in STEPS)


def test_every_name_in_the_code_is_known() -> None:
    """Kernels, ranges and autograd functions, as their sources name them."""
    package = ROOT / "megatron_lighthouse"
    source = {path: path.read_text() for folder in (package, ROOT / "kernels") for path in folder.rglob("*.py")}
    source = {path: text for path, text in source.items() if "profiling" not in path.parts}
    kernels = {name for text in source.values() for name in re.findall(r'repr=lambda _: "(\w+)"', text)}
    assert len(kernels) >= 11
    for name in kernels - {OF_ANY_LAYER}:
        mark = kernel_mark(name)
        assert mark is not None, name
        assert mark.row in (*STEPS, BETWEEN), name
        own = "forward" if "_forward" in name else None
        assert mark.direction == ("backward" if name.endswith(IN_BACKWARD) or "_backward" in name else own), name
    ranges = {name for text in source.values() for name in re.findall(r'\bprofiled\("([\w ]+)"\)', text)}
    assert len(ranges) >= 9
    for name in ranges:
        mark = range_mark(f"lighthouse/{name}")
        assert mark is not None
        assert mark.row in STEPS, name
        assert mark.direction == ("backward" if name.endswith("backward") else "forward")
    steps = ("reference.py", "gathered.py", "sharded", "sharded.py", "context_parallel", "kernels", "travel.py")
    nodes = {
        f"{name}Backward"
        for path, text in source.items()
        if set(steps) & set(path.parts)
        for name in re.findall(r"class (\w+)\(torch\.autograd\.Function\)", text)
    }
    of_any_layer = {"_RingBackward", "_GatheredBackward", "_WindowedBackward", "_ByHeadsBackward"}
    assert nodes - set(NODES) == of_any_layer
    assert set(NODES) <= nodes


@pytest.mark.parametrize(
    ("names", "between"),
    [
        ("scatter backward, gather backward, scatter backward, gather backward", ["attend", None, "attend"]),
        ("attended_norms, attended_norms, select, gather, attend, scatter", [BETWEEN] * 5),
        ("scatter, score, select", [None, BETWEEN]),  # the next layer
        ("scatter, scatter, scatter backward", [None, None]),  # again, for the output projection's gradient
        ("gather backward, gather backward", [None]),  # the reference's, of keys and of values
        ("scatter backward, scatter backward", [None]),  # of layers whose inputs have no gradient
    ],
)
def test_what_runs_between_two_steps_of_a_layer_is_its_own(names: str, between: list[str | None]) -> None:
    ranges = [Range(10.0 * i, 10.0 * i + 5, f"lighthouse/{name}") for i, name in enumerate(names.split(", "))]
    thread = Thread(ranges)
    marks = [thread.mark(10.0 * i + 7) for i in range(len(ranges) - 1)]
    assert [mark.row if mark else None for mark in marks] == between
    assert thread.mark(-1) is None
    assert thread.mark(10.0 * len(ranges)) is None
    assert thread.mark(2) == range_mark(ranges[0].name)


def test_union() -> None:
    assert union([(5, 6), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 6)]
    assert length(union([])) == 0


def test_errors_name_the_file_and_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write_torch(tmp_path / "good.json", torch_events())
    other = tmp_path / "other.txt"
    other.write_text("loss 3.2")
    assert "is no file" in refused(capsys, tmp_path / "missing.json")
    assert re.search(r"other.txt is neither.*profile a run with --attention lighthouse", refused(capsys, other))
    other.write_text("{ 1")
    assert "cut short" in refused(capsys, other)
    cut = tmp_path / "cut.json.gz"
    cut.write_bytes(gzip.compress(json.dumps({"traceEvents": torch_events()}).encode())[:-400])
    assert "cut.json.gz is cut short" in refused(capsys, cut)
    other.write_text('{"loss": 3.2}')
    assert "traceEvents" in refused(capsys, other)
    empty = write_torch(tmp_path / "empty.json", [])
    assert re.search("no GPU work.*--use-pytorch-profiler", refused(capsys, empty))
    dense = [e for e in torch_events() if "ighthouse" not in e["name"] and e["name"].removeprefix(NODE) not in NODES]
    assert re.search(
        "nothing of Lighthouse.*--attention lighthouse", refused(capsys, write_torch(tmp_path / "dense.json", dense))
    )
    assert "--iterations 0 must be at least 1" in refused(capsys, good, "--iterations", 0)
    assert "--csv" in refused(capsys, good, "--csv", tmp_path / "nowhere" / "a.csv")
    on_cpu = write_torch(tmp_path / "cpu.json", [e for e in torch_events() if not e["cat"].startswith(("gpu", "kernel"))])
    assert "traces of one kind" in refused(capsys, good, on_cpu)


def test_errors_of_databases(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    database = sqlite3.connect(tmp_path / "other.sqlite")
    database.execute("CREATE TABLE losses (x INT)")
    database.commit()
    database.close()
    assert "no export of Nsight Systems" in refused(capsys, tmp_path / "other.sqlite")
    (tmp_path / "cut.sqlite").write_bytes(write_nsys(tmp_path / "whole.sqlite").read_bytes()[:3000])
    assert "cut.sqlite cannot be read" in refused(capsys, tmp_path / "cut.sqlite")
    report_file = tmp_path / "a.nsys-rep"
    report_file.write_bytes(b"NSYS")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "nsys export --type sqlite a.nsys-rep" in refused(capsys, report_file)
    # a program that does what nsys would
    nsys = tmp_path / "nsys"
    nsys.write_text(f'#!/bin/sh\n[ "$1 $2 $3 $4" = "export --type sqlite --output" ] && /bin/cp {tmp_path}/whole.sqlite "$5"\n')
    nsys.chmod(0o755)
    check_by_hand(report.ranks([report_file], 2))
    nsys.write_text("#!/bin/sh\necho too new >&2; exit 1\n")
    assert "too new" in refused(capsys, report_file)
