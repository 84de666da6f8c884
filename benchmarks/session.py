"""`python benchmarks/session.py --within 1650 --gpus 2 --out FOLDER --work FOLDER`: the open measurements, in order of worth.

Each is a benchmark or an experiment, a process of its own, on as many GPUs as it takes: `--list` names all, `--cases` takes
some, in the order in which they are given. The first that waits starts as soon as its GPUs are free and, where less time is
left than it is worth, not at all. One that is over its limit is killed with all that it started, and one that fails leaves the
end of its log: the others go on. A line is printed for each as it ends. Tables, logs and pictures are copied to --out every
quarter of a minute, checkpoints stay in --work. The same command again goes on where it was cut off; `--again` repeats what has
ended. With four GPUs `--gpus 4 --cases 'four-*'` is what needs them, with eight `--gpus 8 --cases 'eight-*'`.

`--rehearse` runs all of it on a CPU, tiny. Ends with status 0 where all is done, 75 where the same command goes on, and else
1, where something failed. To outlive the command that starts it: benchmarks/detached.sh.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import Process, adopt, end, end_orphans, started
from session_cases import CASES, Case

ROOT = Path(__file__).resolve().parents[1]
"""Put before PYTHONPATH of every case: this script imports nothing of the package, which need not be installed."""
TICK, EVERY, ENDING = 0.2, 15.0, 12.0
"""Seconds between two looks at what runs, between two copies of what it left, and to save and end in before a limit."""
SLOWER = 10.0
"""Times its limit, that a case has on a CPU."""
GOES_ON = 75  # EX_TEMPFAIL: the status of what goes on with the same command
LOG, SHOWN = "log.txt", 6
"""Of a case, and how many lines of it are shown where it was not done."""
DONE, CUT_OFF, NOT_BEGUN = "done", "cut off", "not begun"
"""How a case has ended; or "over its limit", or "failed" with its status."""
KEPT, LARGEST = {".csv", ".json", ".md", ".png", ".log", ".txt", ".tgz"}, 4 * 2**20
"""What is copied to --out: suffixes, and bytes at most."""


@dataclass
class Going:
    """A case that runs."""

    case: Case
    process: Process
    gpus: list[str]
    folder: Path
    began: float
    until: float


class Session:
    """Cases, and the state of those that have ended."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.start = options, time.monotonic()
        self.until = self.start + options.within
        self.state_file = options.out / "session.json"
        self.state: dict[str, dict[str, Any]] = json.loads(self.state_file.read_text()) if self.state_file.is_file() else {}
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(options.gpus)))
        self.free = visible.split(",")[: options.gpus]
        self.going: list[Going] = []
        self.slower = SLOWER if options.rehearse else 1.0

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.start:5.0f} s] {text}", flush=True)

    def run(self, cases: Sequence[Case]) -> int:
        """Run those that have not ended; answers the exit status."""
        waiting = [case for case in cases if case.name in self.options.again or not self.settled(case)]
        copied = time.monotonic()
        adopt()
        try:
            while waiting or self.going:
                for one in [*self.going]:
                    if one.process.poll() is not None or time.monotonic() > one.until:
                        self.ended(one)
                while waiting and self.next(waiting[0]):
                    waiting.pop(0)
                if time.monotonic() - copied > EVERY:
                    for one in self.going:
                        keep(one.folder, self.options.out / one.case.folder)
                    copied = time.monotonic()
                time.sleep(TICK)
        finally:  # of a session that was told to end
            end([one.process for one in self.going])
            for one in self.going:
                keep(one.folder, self.options.out / one.case.folder)
        found = [self.status(case.name) for case in cases]
        left = [case.name for case in cases if not self.settled(case) and not self.left_out(case)]
        self.say(f"{found.count(DONE)} of {len(cases)} done" + (f", left: {' '.join(left)}" if left else ""))
        return GOES_ON if left else 0 if {*found} <= {DONE, NOT_BEGUN} else 1

    def status(self, name: str) -> str:
        return str(self.state.get(name, {}).get("status", NOT_BEGUN))

    def settled(self, case: Case) -> bool:
        """Whether it has ended, well or not: what was cut off has not."""
        return self.status(case.name) not in (CUT_OFF, NOT_BEGUN)

    def left_out(self, case: Case) -> str:
        """Why it cannot run here; nothing where it can."""
        if case.gpus > self.options.gpus:
            return f"takes {case.gpus} GPUs"
        if case.needs and not self.options.rehearse and not all(map(os.path.isdir, os.environ.get(case.needs, "").split(":"))):
            return f"needs {case.needs}=FOLDER:… in the environment, folders that are there"
        if case.after and self.status(case.after) != DONE and case.after not in [one.case.name for one in self.going]:
            return f"needs {case.after}, which is not done"
        return ""

    def next(self, case: Case) -> bool:
        """Whether the next one may be looked at: this one was started, or never will be."""
        left, least = self.until - time.monotonic(), case.least * self.slower
        if because := self.left_out(case):
            self.say(f"{case.name}: left out: {because}")
            return True
        if left < least:
            self.say(f"{case.name}: not begun: it is worth {least:.0f} s, and {left:.0f} are left")
            return True
        if len(self.free) < case.gpus or (case.after and self.status(case.after) != DONE):
            return False
        self.begin(case, left)
        return True

    def begin(self, case: Case, left: float) -> None:
        """Start its process, which has `left` seconds at most."""
        options, now = self.options, time.monotonic()
        seconds, folder = min(case.limit * self.slower, left), options.work / case.folder
        folder.mkdir(parents=True, exist_ok=True)
        places = {"out": folder, "work": options.work, "within": max(1, int(seconds - ENDING))}
        words = [word.format(**places) for word in shlex.split(f"{case.words} {case.tiny if options.rehearse else ''}")]
        gpus, self.free = self.free[: case.gpus], self.free[case.gpus :]
        paths = [os.environ.get(case.needs, "") if case.needs else "", str(ROOT), os.environ.get("PYTHONPATH", "")]
        given = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        given |= {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
        process = started([sys.executable, *words], folder / LOG, given, ROOT)
        self.going.append(Going(case, process, gpus, folder, now, now + seconds))

    def ended(self, one: Going) -> None:
        """Note how, after it was ended where it is over its time, and give back its GPUs."""
        status = one.process.poll()  # None: it is over its time
        end([one.process])
        end_orphans(other.process for other in self.going)
        seconds = round(time.monotonic() - one.began, 1)
        ways = {None: CUT_OFF if one.until >= self.until else "over its limit", 0: DONE, GOES_ON: CUT_OFF}
        self.state[one.case.name] = {"status": ways.get(status, f"failed: status {status}"), "seconds": seconds}
        self.going.remove(one)
        self.free = sorted([*self.free, *one.gpus])
        log = [] if status == 0 else (one.folder / LOG).read_text(errors="replace").splitlines()[-SHOWN:]
        said = [f"{one.case.name}: {self.status(one.case.name)} after {seconds:.0f} s", *(line[:200] for line in log)]
        self.say("\n        ".join(said))
        keep(one.folder, self.options.out / one.case.folder)
        self.state_file.write_text(json.dumps(self.state, indent=2) + "\n")


def keep(folder: Path, out: Path) -> None:
    """Copy what is worth more than its bytes."""
    for file in folder.rglob("*"):
        with suppress(OSError):  # it may be gone by now
            if file.suffix in KEPT and file.is_file() and file.stat().st_size <= LARGEST:
                to = out / file.relative_to(folder)
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, to)


def main(cases: Sequence[Case] = CASES, argv: Sequence[str] | None = None) -> int:
    known = {case.name: case for case in cases}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="for tables and logs")
    parser.add_argument("--work", type=Path, help="for what is large")
    parser.add_argument("--within", type=float, default=1650, metavar="SECONDS")
    parser.add_argument("--gpus", type=int, default=2, help="that are there (default: %(default)s)")
    parser.add_argument("--cases", nargs="+", default=list(known), metavar="CASE", help="* stands for any letters")
    parser.add_argument("--again", nargs="+", choices=known, default=[], metavar="CASE")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args(argv)
    chosen = [name for one in options.cases for name in fnmatch.filter(known, one)]
    if odd := [one for one in options.cases if not fnmatch.filter(known, one)]:
        parser.error(f"--cases {' '.join(odd)}: no such case: --list names all.")
    if options.list:
        for case in map(known.__getitem__, chosen):
            print(f"{case.name:18} {case.gpus} GPUs, {case.limit:4.0f} s: {case.title}")
        return 0
    if not (options.out and options.work):
        parser.error("--out and --work are needed: folders for tables, and for what is large.")
    options.out, options.work = options.out.resolve(), options.work.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs ends too
    return Session(options).run([known[name] for name in dict.fromkeys(chosen)])


if __name__ == "__main__":
    sys.exit(main())
