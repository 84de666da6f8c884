"""A small profile as each profiler writes it, and what it comes to when added up by hand."""

from __future__ import annotations

import gzip
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from megatron_lighthouse.profiling import report
from megatron_lighthouse.profiling.__main__ import main
from megatron_lighthouse.profiling.names import BETWEEN, COMMUNICATION, DENSE, REST

MAIN, ENGINE = 10, 11
"""CPU threads: of the training loop, and of autograd."""
NODE = "autograd::engine::evaluate_function: "

RANGES = [
    # forward of a Lighthouse layer on the main thread
    (MAIN, 100, 110, "lighthouse/score"),
    (MAIN, 120, 130, "lighthouse/select"),
    (MAIN, 140, 150, "lighthouse/gather"),
    (MAIN, 160, 170, "lighthouse/attend"),
    (MAIN, 180, 190, "lighthouse/scatter"),
    # its checkpoint: forward again, then backward
    (ENGINE, 1000, 1400, NODE + "CheckpointFunctionBackward"),
    (ENGINE, 1010, 1020, "lighthouse/score"),
    (ENGINE, 1030, 1040, "lighthouse/scatter"),
    (ENGINE, 1100, 1120, NODE + "ScatterBackward"),
    (ENGINE, 1105, 1115, "lighthouse/scatter backward"),
    (ENGINE, 1120, 1130, NODE + "_HaloBackward"),
    (ENGINE, 1140, 1180, NODE + "SomebodysAttentionBackward"),
    (ENGINE, 1200, 1220, NODE + "GatherBackward"),
    (ENGINE, 1205, 1215, "lighthouse/gather backward"),
    (ENGINE, 1300, 1350, NODE + "MmBackward0"),
]
LAUNCHED = [
    # thread, when, GPU work, its start and length in milliseconds, its stream
    (MAIN, 50, "gemm", 0, 10, 7),
    (MAIN, 60, "flash_fwd_kernel", 10, 18, 7),
    (MAIN, 62, "lighthouse_merge", 28, 2, 7),
    (MAIN, 105, "lighthouse_score", 30, 1, 7),
    (MAIN, 115, "fill", 31, 1, 7),  # between score and select
    (MAIN, 125, "lighthouse_select_refine", 32, 2, 7),
    (MAIN, 145, "lighthouse_gather_forward", 34, 3, 7),
    (MAIN, 155, "ncclDevKernel_SendRecv", 35, 5, 20),  # 35..37 behind the gather, 37..40 behind nothing
    (MAIN, 165, "cudnn_sdpa", 40, 3, 7),
    (MAIN, 168, "lighthouse_merge", 43, 1, 7),
    (MAIN, 185, "lighthouse_scatter_forward", 44, 5, 7),
    (MAIN, 195, "gemm", 49, 1, 7),
    (ENGINE, 1005, "gemm", 58, 2, 7),  # idle: 50..58
    (ENGINE, 1015, "lighthouse_score", 60, 1, 7),
    (ENGINE, 1035, "lighthouse_scatter_forward", 61, 5, 7),
    (ENGINE, 1110, "lighthouse_scatter_backward", 66, 6, 7),
    (ENGINE, 1125, "lighthouse_edge", 72, 1, 7),
    (ENGINE, 1150, "cudnn_bprop", 73, 8, 7),
    (ENGINE, 1150, "Memcpy DtoD (Device -> Device)", 74, 10, 30),  # by the copy engine: 81..84 not hidden
    (ENGINE, 1150, "Memset (Device)", 81, 1, 7),
    (ENGINE, 1210, "lighthouse_gather_backward", 84, 7, 7),
    (ENGINE, 1320, "gemm", 91, 8, 7),
    (ENGINE, 1325, "Memcpy DtoD (Device -> Device)", 99, 1, 7),  # of a tensor, among kernels
]
"""Of two iterations: 0 to 100 ms."""
BY_HAND = {
    ("score", "forward"): 1,
    ("score", "recompute"): 1,
    ("select", "forward"): 2,
    ("gather", "forward"): 3,
    ("gather", "backward"): 7,
    ("attend", "forward"): 4,
    ("attend", "backward"): 9,  # the kernel and the fill
    ("scatter", "forward"): 5,
    ("scatter", "recompute"): 5,
    ("scatter", "backward"): 6,
    (BETWEEN, "forward"): 1,
    (BETWEEN, "backward"): 1,
    (COMMUNICATION, "forward"): 5,
    (COMMUNICATION, "backward"): 10,
    (DENSE, "forward"): 20,
    (REST, "forward"): 11,
    (REST, "recompute"): 2,
    (REST, "backward"): 9,
}
HIDDEN_BY_HAND = {"forward": 3, "backward": 3, "all": 6}
"""Not hidden, that is: the fill within 81..84 is no kernel."""
AT_ONCE, IDLE, WALL = 2 + 8, 8, 100
"""At once: the gather with what NCCL sends, and what is copied with the attention (7) and the fill (1)."""


def launch(thread: int) -> str:
    return "cuda_driver" if thread == MAIN else "cuda_runtime"


def category(name: str) -> str:
    return "gpu_memcpy" if "Memcpy" in name else "gpu_memset" if "Memset" in name else "kernel"


def torch_events() -> list[dict[str, Any]]:
    """The work above as torch.profiler writes it, in microseconds."""
    events: list[dict[str, Any]] = [
        {"ph": "X", "cat": "user_annotation", "name": f"ProfilerStep#{i}", "pid": 1, "tid": MAIN, "ts": 0, "dur": 40}
        for i in (8, 9)
    ]
    for thread, start, end, name in RANGES:
        kind = "user_annotation" if name.startswith("lighthouse") else "cpu_op"
        events.append({"ph": "X", "cat": kind, "name": name, "pid": 1, "tid": thread, "ts": start, "dur": end - start})
    for number, (thread, at, name, start, ms, stream) in enumerate(LAUNCHED):
        details = {"correlation": number, "device": 0, "stream": stream}
        events.append(
            {"ph": "X", "cat": launch(thread), "name": "l", "pid": 1, "tid": thread, "ts": at, "dur": 1, "args": details}
        )
        where = {"pid": 0, "tid": stream, "ts": 5000 + 1000 * start, "dur": 1000 * ms}
        events.append({"ph": "X", "cat": category(name), "name": name, **where, "args": details})
    return events


def write_torch(path: Path, events: list[dict[str, Any]], **more: Any) -> Path:
    text = json.dumps({"schemaVersion": 1, "traceEvents": events, **more})
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def write_nsys(path: Path, engine_ranges: bool = True, old: bool = False) -> Path:
    """The work above as `nsys export --type sqlite` writes it, in nanoseconds; `old` lacks columns and numbers no strings."""
    database, strings = sqlite3.connect(path), dict[str, int]()
    pid = 77 << 24
    database.execute("CREATE TABLE StringIds (id INTEGER, value TEXT)")
    database.execute(
        "CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INT, end INT, globalTid INT, correlationId INT, nameId INT)"
    )
    database.execute("CREATE TABLE NVTX_EVENTS (start INT, end INT, eventType INT, text TEXT, textId INT, globalTid INT)")
    stream = "deviceId INT, contextId INT, streamId INT, correlationId INT" + (", globalPid INT" if not old else "")
    names = "demangledName INT, shortName INT" if not old else "shortName INT"
    database.execute(f"CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INT, end INT, {stream}, {names})")
    database.execute(f"CREATE TABLE CUPTI_ACTIVITY_KIND_MEMCPY (start INT, end INT, {stream}, copyKind INT)")
    database.execute(f"CREATE TABLE CUPTI_ACTIVITY_KIND_MEMSET (start INT, end INT, {stream})")

    def insert(table: str, *values: Any) -> None:
        database.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(values))})", values)

    for thread, start, end, name in RANGES:
        if engine_ranges or not name.startswith(NODE):
            text = f"{name}, seq = 4, op_id = 9" if name.startswith(NODE) else name
            number = None if old else strings.setdefault(text, len(strings))
            insert("NVTX_EVENTS", start * 1000, end * 1000, 59, text if old else None, number, pid + thread)
    insert("NVTX_EVENTS", 0, 10**9, 60, "lighthouse/score", None, pid + MAIN)  # of another kind: does not nest
    insert("NVTX_EVENTS", 0, None, 34, "a mark", None, pid + MAIN)
    for number, (thread, at, name, start, ms, lane) in enumerate(LAUNCHED):
        insert("CUPTI_ACTIVITY_KIND_RUNTIME", at * 1000, at * 1000 + 1, pid + thread, number, 0)
        insert("CUPTI_ACTIVITY_KIND_RUNTIME", 0, 1, (78 << 24) + thread, number, 0) if not old else None  # another process
        begin = 5_000_000 + start * 1_000_000
        row = [begin, begin + ms * 1_000_000, 0, 1, lane, number, *([] if old else [pid])]
        if category(name) == "kernel":
            own = strings.setdefault(name, len(strings))
            insert("CUPTI_ACTIVITY_KIND_KERNEL", *row, *([own] if old else [own, strings.setdefault("short", len(strings))]))
        elif category(name) == "gpu_memcpy":
            insert("CUPTI_ACTIVITY_KIND_MEMCPY", *row, 8)
        else:
            insert("CUPTI_ACTIVITY_KIND_MEMSET", *row)
    database.executemany("INSERT INTO StringIds VALUES (?, ?)", [(number, text) for text, number in strings.items()])
    database.commit()
    database.close()
    return path


def check_by_hand(found: list[report.Rank], iterations: int = 2) -> None:
    (rank,) = found
    times = rank.times
    assert rank.iterations == iterations
    assert times.rows == pytest.approx({key: ms / iterations for key, ms in BY_HAND.items()})
    assert times.exposed == pytest.approx({key: ms / iterations for key, ms in HIDDEN_BY_HAND.items()})
    assert [times.at_once, times.idle, times.wall] == pytest.approx([x / iterations for x in (AT_ONCE, IDLE, WALL)])
    assert sum(times.rows.values()) - times.at_once + times.idle == pytest.approx(times.wall)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["report", *map(str, arguments)]) == 2
    return capsys.readouterr().err
