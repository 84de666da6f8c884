"""`python benchmarks/scaling_keep.py WORK FOLDER`: what `plan scaling` reads of a study, small enough for the repository.

Of each run below WORK, the --work folder of scaling.sh or its unpacked scaling.tgz: run.json without its command line, which
names files of the machine, and of the logs what they say of iterations and of memory. `plan scaling FOLDER --out …` makes the
table and pictures again from them.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

KEPT = re.compile(r"iteration +\d+/ *\d+ \|.*?lm loss: [^ ]+ \||max allocated: [\d.]+")
"""Anywhere in a line, for ranks write into each other's."""


def keep(work: Path, out: Path) -> int:
    """Write them; answers how many runs there are."""
    runs = sorted(work.rglob("run.json"))
    for file in runs:
        target = out / file.parent.relative_to(work)
        target.mkdir(parents=True, exist_ok=True)
        facts = json.loads(file.read_text())
        facts.pop("arguments", None)
        (target / "run.json").write_text(json.dumps(facts, indent=1) + "\n")
        for log in sorted(file.parent.glob("logs/*.log")):
            lines = KEPT.findall(log.read_text(errors="replace"))
            (target / log.name).write_text("\n".join(lines) + "\n")
    return len(runs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    print(f"{keep(options.work, options.out)} runs in {options.out}")
