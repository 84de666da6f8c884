"""Profiles from Nsight Systems: its SQLite export, by the schema in its documentation ("SQLite Schema Reference")."""

from __future__ import annotations

import re
import shutil
import sqlite3
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from megatron_lighthouse.profiling.spans import Profile, is_time, left_out, span_of
from megatron_lighthouse.profiling.threads import Range, Thread

ON_GPU = {
    "CUPTI_ACTIVITY_KIND_KERNEL": "kernel",
    "CUPTI_ACTIVITY_KIND_MEMCPY": "memcpy",
    "CUPTI_ACTIVITY_KIND_MEMSET": "memset",
    "CUPTI_ACTIVITY_KIND_GRAPH_TRACE": "CUDA graph",
}
"""Tables of GPU work, and what work is called that has no name there."""
LAUNCHES = ("CUPTI_ACTIVITY_KIND_RUNTIME", "CUPTI_ACTIVITY_KIND_DRIVER")
WITHIN_GPU, BETWEEN_GPUS = 8, 10
"""CUPTI_ACTIVITY_KIND_MEMCPY.copyKind, by CUPTI's CUpti_ActivityMemcpyKind."""
PUSH_POP = 59
"""NVTX_EVENTS.eventType of the ranges that nest: push and pop, on one thread."""
PROCESS = 24
"""globalTid and globalPid hold a thread's number in their low 24 bits, the process in those above."""


def read_report(path: Path) -> list[Profile]:
    """As `read_nsys`, of an .nsys-rep file, exported by `nsys` to a folder that is removed again.

    Raises:
        ValueError: `nsys` is not there, or fails.
    """
    nsys = shutil.which("nsys")
    if nsys is None:
        raise ValueError(
            f"{path} can only be read by nsys, which is not on PATH. Where it is, run `nsys export --type sqlite {path.name}`, "
            "and give the .sqlite file."
        )
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / f"{path.stem}.sqlite"
        done = subprocess.run(
            [nsys, "export", "--type", "sqlite", "--output", str(exported), str(path)],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode or not exported.exists():
            raise ValueError(f"`nsys export --type sqlite {path}` failed: {(done.stderr or done.stdout).strip()}")
        return read_nsys(exported)


def read_nsys(path: Path) -> list[Profile]:
    """One profile for each process and GPU of the export; iterations are not marked in it.

    Raises:
        ValueError: a database that is no such export.
    """
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
            database.text_factory = lambda raw: raw.decode(errors="replace")  # a range may have any bytes for a name
            return _read(database, path)
    except sqlite3.Error as error:
        raise ValueError(f"{path} cannot be read as an SQLite database: {error}. Export it again.") from error


def _read(database: sqlite3.Connection, path: Path) -> list[Profile]:
    tables = _tables(database)
    if not tables.keys() & {"StringIds", "NVTX_EVENTS", *ON_GPU}:
        raise ValueError(f"{path} is an SQLite database, but no export of Nsight Systems: it lacks the table StringIds.")
    strings = dict(_rows(database, tables, "StringIds", "id", "value"))
    threads = _threads(database, tables, strings)
    launches: dict[tuple[int | None, Any], tuple[int | None, int]] = {}
    for table in LAUNCHES:
        for start, correlation, thread in _rows(database, tables, table, "start", "correlationId", "globalTid"):
            if not is_time(start, start):
                continue
            launches[None, correlation] = thread, start  # for versions that do not name a kernel's process
            launches[None if thread is None else thread >> PROCESS, correlation] = thread, start
    gpus: dict[tuple[int | None, Any], Profile] = {}
    lost: dict[tuple[int | None, Any], int] = defaultdict(int)
    graphs: dict[tuple[int | None, Any], int] = defaultdict(int)
    wrong = 0
    kernels, where = "CUPTI_ACTIVITY_KIND_KERNEL", ("globalPid", "contextId", "streamId")
    computing = set(_rows(database, tables, kernels, *where))
    columns = ("start", "end", "deviceId", "correlationId", "demangledName", "shortName", "copyKind", *where)
    for table, kind in ON_GPU.items():
        for start, end, device, correlation, long, short, copy, *stream in _rows(database, tables, table, *columns):
            if not is_time(start, end):
                wrong += 1
                continue
            process = None if stream[0] is None else stream[0] >> PROCESS
            thread, at = launches.get((process, correlation), (None, start))
            name = _text(strings, long) or _text(strings, short) or kind
            sends = copy == BETWEEN_GPUS or (copy == WITHIN_GPU and tuple(stream) not in computing)
            is_kernel = kind in ("kernel", "CUDA graph")
            span = span_of(name, start / 1e3, end / 1e3, threads.get(thread), at / 1e3, is_kernel, sends)
            gpu = process, device
            gpus.setdefault(gpu, Profile(path.name, [], None)).spans.append(span)
            lost[gpu] += thread is None
            graphs[gpu] += kind == "CUDA graph"
    found = sorted(gpus.items(), key=lambda item: tuple(-1 if x is None else x for x in item[0]))
    for (process, device), profile in found:
        if len(gpus) > 1:
            number = "" if process is None else f", process {process & 0xFFFFFF}"
            profile.name += f"{number}, GPU {device}"
        if count := lost[process, device]:
            profile.notes.append(
                f"{count:,} of {len(profile.spans):,} pieces of GPU work have no launch in the trace: they count by their "
                "names alone, and as forward where these say nothing."
            )
        if count := graphs[process, device]:
            profile.notes.append(
                f"{count:,} CUDA graphs were traced as a whole, without their kernels: profile with --cuda-graph-trace=node."
            )
        profile.notes += left_out(wrong)
    return [profile for _, profile in found]


def _tables(database: sqlite3.Connection) -> dict[str, str]:
    """Tables and views by name; one that this version of nsys numbers, such as NVTX_EVENTS_V2, by its name without number too.

    Of several the latest that has a row.
    """
    names = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")]
    found = {name: name for name in names}
    for name in sorted(names, key=lambda name: (len(name), name)):
        bare = re.sub(r"_V\d+$", "", name)
        if bare not in found or (bare != name and database.execute(f'SELECT 1 FROM "{name}" LIMIT 1').fetchone()):
            found[bare] = name
    return found


def _threads(database: sqlite3.Connection, tables: dict[str, str], strings: dict[int, str]) -> dict[int | None, Thread]:
    """The NVTX ranges of each thread."""
    ranges: dict[int | None, list[Range]] = defaultdict(list)
    columns = ("start", "end", "eventType", "text", "textId", "globalTid")
    for start, end, kind, text, number, thread in _rows(database, tables, "NVTX_EVENTS", *columns):
        name = text or _text(strings, number)
        if name and is_time(start, end) and kind in (PUSH_POP, None):
            ranges[thread].append(Range(start / 1e3, end / 1e3, name))
    return {thread: Thread(found) for thread, found in ranges.items()}


def _rows(database: sqlite3.Connection, tables: dict[str, str], table: str, *columns: str) -> Iterator[tuple[Any, ...]]:
    """Those columns of a table, None for what this version of nsys does not write; nothing where the table is missing.

    In the order of time, outer ranges first: since 2025.6 nsys writes them in none.
    """
    if table not in tables:
        return iter(())
    there = {column for _, column, *_ in database.execute(f'PRAGMA table_info("{tables[table]}")')}
    named = ", ".join(f'"{c}"' if c in there else "NULL" for c in columns)
    order = [f'"{column}" {way}' for column, way in (("start", "ASC"), ("end", "DESC")) if column in there]
    return database.execute(f'SELECT {named} FROM "{tables[table]}"' + (f" ORDER BY {', '.join(order)}" if order else ""))


def _text(strings: dict[int, str], value: Any) -> str | None:
    """A name: the number of one in StringIds, or the name itself."""
    return strings.get(value) if isinstance(value, int) else value
