"""Profiles from a trace of torch.profiler: Chrome's JSON, as `export_chrome_trace` and Megatron write it."""

from __future__ import annotations

import gzip
import json
import zlib
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_lighthouse.profiling.spans import Profile, is_time, left_out, span_of
from megatron_lighthouse.profiling.threads import Range, Thread

Event = dict[str, Any]
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
ON_CPU = ("cpu_op", "user_annotation")
CUT = "Let the run end, or take the trace of another rank."


def read_torch(path: Path) -> list[Profile]:
    """One profile for each GPU of the trace; for the CPU where it saw no GPU.

    A kernel belongs to the range that was open where it was launched: its correlation id names the launch.

    Raises:
        ValueError: a file that is no such trace.
    """
    events, rank = _load(path)
    by_category: dict[str, list[Event]] = defaultdict(list)
    wrong: dict[str, int] = defaultdict(int)
    for event in events:
        if event.get("ph") == "X" and "dur" in event:
            category = str(event.get("cat", ""))
            if _is_whole(event):
                by_category[category].append(event)
            else:
                wrong[category] += 1
    threads = _threads([event for category in ON_CPU for event in by_category[category]])
    steps = {e["name"] for e in by_category["user_annotation"] if e["name"].startswith("ProfilerStep#")}
    name, iterations = path.name if rank is None else f"rank {rank}", len(steps) or None
    if not any(by_category[category] for category in ON_GPU):
        spans = [span_of(n, s, e, threads.get(key), s) for key, s, e, n in _own_times(by_category["cpu_op"])]
        bad = sum(wrong[category] for category in (*ON_CPU, *ON_GPU))
        notes = [f"{bad:,} operators and ranges have no name or time, or end before they begin: they are left out."]
        return [Profile(name, spans, iterations, on_cpu=True, notes=notes if bad else [])] if spans else []
    launches = {
        e["args"]["correlation"]: e
        for category in LAUNCHES
        for e in by_category[category]
        if "correlation" in e.get("args", {})
    }
    streams = _threads(by_category["gpu_user_annotation"], is_stream=True)
    computing = {_lane(event) for event in by_category["kernel"]}
    gpus: dict[Hashable, Profile] = {}
    lost: dict[Hashable, int] = defaultdict(int)
    for category in ON_GPU:
        for event in by_category[category]:
            details, start = event.get("args", {}), event["ts"]
            gpu, launch = details.get("device", event["pid"]), launches.get(details.get("correlation"))
            thread, at = (threads.get(_lane(launch)), launch["ts"]) if launch else (streams.get(_lane(event)), start)
            lost[gpu] += launch is None
            sends = "PtoP" in event["name"] or ("DtoD" in event["name"] and _lane(event) not in computing)
            is_kernel = category == "kernel"
            span = span_of(event["name"], start, start + event["dur"], thread, at, is_kernel, sends and not is_kernel)
            gpus.setdefault(gpu, Profile(name, [], iterations)).spans.append(span)
    for gpu, profile in gpus.items():
        if len(gpus) > 1:
            profile.name += f", GPU {gpu}"
        if lost[gpu]:
            profile.notes.append(
                f"{lost[gpu]:,} of {len(profile.spans):,} pieces of GPU work have no launch in the trace: they count by their "
                "names and the ranges on their stream, and as forward where these say nothing."
            )
        profile.notes += left_out(sum(wrong[category] for category in ON_GPU))
    return list(gpus.values())


def _is_whole(event: Event) -> bool:
    """Whether an event has what is read of it: a name, a lane, and a time that ends after it begins."""
    start, duration, details = event.get("ts"), event["dur"], event.get("args") or {}
    event["args"] = details
    return (
        isinstance(event.get("name"), str)
        and all(isinstance(event.get(key), int | str) for key in ("pid", "tid"))
        and is_time(start, start)
        and is_time(0, duration)
        and isinstance(details, dict)
        and all(isinstance(details.get(key), int | str | None) for key in ("correlation", "device"))
    )


def _load(path: Path) -> tuple[list[Event], int | None]:
    """The events, and the rank where the trace says it. A name may have any bytes: what is no UTF-8 is replaced."""
    raw = path.read_bytes()
    try:
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig", errors="replace").rstrip()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is cut short, or damaged: {error}. {CUT}") from error
    try:
        trace = json.loads(text, strict=False)  # a name may have control characters
    except (ValueError, RecursionError) as error:
        at = error.pos if isinstance(error, json.JSONDecodeError) else len(text)
        if at >= len(text) or text[-1:] not in ("}", "]"):
            raise ValueError(f"{path} is cut short, or no trace: {error}. {CUT}") from error
        raise ValueError(
            f"{path} is no valid JSON: {error}, at {text[max(0, at - 40) : at + 40]!r}. A quote or a backslash in a name, "
            "which a profiler does not escape, does that: rename the range, or mend the file there."
        ) from error
    events = trace.get("traceEvents") if isinstance(trace, dict) else trace
    if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
        raise ValueError(f"{path} is JSON, but no trace: torch.profiler's has a list `traceEvents`.")
    info = trace.get("distributedInfo") if isinstance(trace, dict) else None
    return events, info.get("rank") if isinstance(info, dict) else None


def _lane(event: Event) -> Hashable:
    """The thread of what ran on a CPU, the stream of what ran on a GPU."""
    return event["pid"], event["tid"]


def _threads(events: Sequence[Event], is_stream: bool = False) -> dict[Hashable, Thread]:
    ranges: dict[Hashable, list[Range]] = defaultdict(list)
    for event in events:
        ranges[_lane(event)].append(Range(event["ts"], event["ts"] + event["dur"], event["name"]))
    return {lane: Thread(found, is_stream) for lane, found in ranges.items()}


def _own_times(operators: Sequence[Event]) -> Iterator[tuple[Hashable, float, float, str]]:
    """The pieces of each operator's time that are not of an operator within it: (thread, start, end, name)."""
    by_thread: dict[Hashable, list[Event]] = defaultdict(list)
    for event in operators:
        by_thread[_lane(event)].append(event)
    for thread, events in by_thread.items():
        stack: list[tuple[float, str]] = []
        now = 0.0
        last: Event = {"ts": float("inf"), "dur": 0.0, "name": ""}  # closes all that is open
        for event in [*sorted(events, key=lambda e: (e["ts"], -e["dur"])), last]:
            start = event["ts"]
            while stack and stack[-1][0] <= start:
                end, name = stack.pop()
                if end > now:
                    yield thread, now, end, name
                    now = end
            if stack and start > now:
                yield thread, now, start, stack[-1][1]
            now = max(now, start)
            end = start + event["dur"]
            stack.append((min(end, stack[-1][0]) if stack else end, event["name"]))
