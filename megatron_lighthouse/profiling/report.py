"""The table of a profile: milliseconds by step, forward and backward apart."""

from __future__ import annotations

import codecs
import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from megatron_lighthouse.plan.report import table
from megatron_lighthouse.profiling.names import BETWEEN, COMMUNICATION, DENSE, DIRECTIONS, REST, ROWS, STEPS
from megatron_lighthouse.profiling.nsys_trace import read_nsys, read_report
from megatron_lighthouse.profiling.spans import Profile, Times, times_of
from megatron_lighthouse.profiling.torch_trace import read_torch

FUSED = "pool: fused into gather and score"
"""Where pooling is: no kernel of its own, nor in the reference an operator outside of these two."""
EXPOSED, AT_ONCE, IDLE, WALL = "  of it not hidden", "less what ran at the same time", "idle", "wall"
HOW = (
    "profile a run with --attention lighthouse by `launch/submit.sh --profile torch` (or nsys), by Megatron's --profile "
    "--use-pytorch-profiler, or by `nsys profile --capture-range=cudaProfilerApi --trace=cuda,nvtx` around a run with --profile"
)


class Rank(NamedTuple):
    """One column: a rank's GPU, and its times."""

    profile: Profile
    iterations: int
    times: Times


def read(path: Path) -> list[Profile]:
    """The profiles in a file, which is known by its content.

    Raises:
        ValueError: a file that cannot be read, is no trace, or holds no work or nothing of Lighthouse.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no file: give traces (.json, .json.gz, .sqlite, .nsys-rep).")
    with path.open("rb") as file:
        begin = file.read(4096)
    if path.suffix == ".nsys-rep":
        profiles = read_report(path)
    elif begin.startswith(b"SQLite format 3\0"):
        profiles = read_nsys(path)
    elif not begin:
        raise ValueError(f"{path} is empty: let the run end, or take the trace of another rank.")
    elif begin.startswith(b"\x1f\x8b") or begin.removeprefix(codecs.BOM_UTF8).lstrip()[:1] in (b"{", b"["):
        profiles = read_torch(path)
    else:
        raise ValueError(
            f"{path} is neither a trace of torch.profiler (.json, .json.gz) nor an export of Nsight Systems (.sqlite, or "
            f".nsys-rep where nsys is on PATH): {HOW}."
        )
    if not profiles:
        raise ValueError(
            f"{path} holds no GPU work, and no operators on a CPU: {HOW}; the profiled ranks must reach an iteration."
        )
    if not all(any(span.end > span.start for span in profile.spans) for profile in profiles):
        raise ValueError(f"{path} holds work of a GPU that takes no time: {HOW}.")
    if not any(span.row in STEPS for profile in profiles for span in profile.spans):
        raise ValueError(
            f"{path} holds work, but nothing of Lighthouse: no range lighthouse/… and no kernel lighthouse_…. Dense layers "
            f"have no steps; else {HOW}."
        )
    return profiles


def ranks(paths: Sequence[Path], iterations: int | None) -> list[Rank]:
    """The ranks in these files. `iterations` is asked of those that do not mark them; 1 by default, and said.

    Raises:
        ValueError: as `read`; or traces of GPUs and of CPUs together.
    """
    if iterations is not None and iterations < 1:
        raise ValueError(f"--iterations {iterations} must be at least 1: give how many iterations the profile holds.")
    if twice := [str(path) for path, count in Counter(path.resolve() for path in paths).items() if count > 1]:
        raise ValueError(f"{' '.join(twice)} is given twice, and would count as two ranks: give each trace once.")
    found = [(path, profile) for path in paths for profile in read(path)]
    if len({profile.on_cpu for _, profile in found}) > 1:
        those = ", ".join(str(path) for path, profile in found if profile.on_cpu)
        raise ValueError(f"{those}: no GPU work, but there is in the others: give traces of one kind.")
    names = [profile.name for _, profile in found]
    result = []
    for path, profile in found:
        if names.count(profile.name) > 1:
            profile.name = f"{path.parent.name}/{path.name} {profile.name}"
        count = iterations or profile.iterations
        if count is None:
            profile.notes.append(
                "no iterations are marked: these are times of the whole profile (--iterations N divides them)."
            )
        result.append(Rank(profile, count or 1, times_of(profile, count or 1)))
    return result


def text(found: Sequence[Rank]) -> str:
    """The whole report."""
    device = "CPU (each operator's own time)" if found[0].profile.on_cpu else "GPU"
    counts = sorted({rank.iterations for rank in found})
    names = found[0].profile.name if len(found) == 1 else f"mean of {len(found)} ranks"
    head = f"{names}: ms of {device} an iteration, over {' or '.join(map(str, counts))} profiled"
    parts = [head, step_table([rank.times for rank in found])]
    if len(found) > 1:
        parts.append(rank_table(found))
    return "\n\n".join([*parts, "\n".join(_notes(found))])


def step_table(times: Sequence[Times]) -> str:
    """Rows of steps, columns of directions; the mean over ranks. The rows add up to the wall."""
    wall = mean(t.wall for t in times)
    rows = sorted({row for t in times for row, _ in t.rows}, key=_place)
    directions = [d for d in DIRECTIONS if d != "recompute" or any(key[1] == d for t in times for key in t.rows)]
    lines: list[Sequence[str]] = []

    def line(name: str, parts: Sequence[float], whole: float) -> None:
        shown = [_number(x) for x in parts] or [""] * len(directions)
        lines.append((name, *shown, _number(whole), f"{whole / wall + 0.0:.1%}"))

    for row in [*STEPS, *(r for r in rows if r not in STEPS)]:
        parts = [mean(t.rows.get((row, d), 0.0) for t in times) for d in directions]
        if row == "pool" and not any(parts):
            lines.append((FUSED, *[""] * len(directions), "", ""))
            continue
        line(row, parts, sum(parts))
        if row == COMMUNICATION:
            line(
                EXPOSED, [mean(t.exposed.get(d, 0.0) for t in times) for d in directions], mean(t.exposed["all"] for t in times)
            )
    line(AT_ONCE, [], -mean(t.at_once for t in times))
    line(IDLE, [], mean(t.idle for t in times))
    line(WALL, [], wall)
    return table(["step", *directions, "all", "share"], lines)


def _number(ms: float) -> str:
    return f"{ms:.3f}" if abs(ms) >= 5e-4 else "-"


def rank_table(found: Sequence[Rank]) -> str:
    """A line for each rank, and which is the slowest: the one with most work of its own, for the others wait for it."""
    rows = [
        [rank.profile.name, *(f"{x:.3f}" for x in (t.wall, t.own_work, communication(t), t.exposed["all"], t.idle))]
        for rank in found
        for t in (rank.times,)
    ]
    slowest = slowest_of(found)
    most, average = slowest.times.own_work, mean(rank.times.own_work for rank in found)
    return "\n".join(
        [
            table(["rank", "wall", "own work", "communication", "not hidden", "idle"], rows),
            f"slowest: {slowest.profile.name}, {most:.3f} ms of its own work, {most / average - 1:.1%} over the mean",
        ]
    )


def slowest_of(found: Sequence[Rank]) -> Rank:
    """Ranks that wait for each other end together: what tells them apart is the work besides communication."""
    return max(found, key=lambda rank: rank.times.own_work)


def communication(times: Times) -> float:
    return sum(value for (row, _), value in times.rows.items() if row == COMMUNICATION)


def write_csv(found: Sequence[Rank], path: Path) -> None:
    """A line for each rank, step and direction; rows of the table that have no direction have that of 'all'."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["rank", "step", "direction", "ms_per_iteration", "share"])
        for rank in found:
            t = rank.times
            lines = [(*key, value) for key, value in sorted(t.rows.items(), key=lambda item: _place(item[0][0]))]
            lines += [("communication not hidden", d, value) for d, value in t.exposed.items()]
            lines += [
                (AT_ONCE, "all", -t.at_once),
                (IDLE, "all", t.idle),
                (WALL, "all", t.wall),
                ("own work", "all", t.own_work),
            ]
            writer.writerows([rank.profile.name, *line, f"{line[2] / t.wall:.6f}"] for line in lines)


def _place(row: str) -> int:
    """Where a row stands in the table; a step that this module does not know comes after those it knows."""
    return ROWS.index(row) if row in ROWS else ROWS.index(BETWEEN)


def _notes(found: Sequence[Rank]) -> list[str]:
    shown = {row for rank in found for row, _ in rank.times.rows}
    notes = [f"{rank.profile.name}: {note}" for rank in found for note in rank.profile.notes]
    if REST in shown:
        notes.append(
            f"'{REST}': a trace does not tell a layer's linears, norms and MLP from embedding, output layer and optimizer."
        )
    notes.append("'forward' of what is not Lighthouse's is all that ran outside of backward, the optimizer's too.")
    if BETWEEN in shown:
        notes.append(
            f"'{BETWEEN}': the deal and the halo of context parallelism, and what a scorer does outside of its kernels."
        )
    if DENSE in shown:
        notes.append(f"'{DENSE}': kernels with the name of an attention, outside of Lighthouse's layers.")
    return notes
