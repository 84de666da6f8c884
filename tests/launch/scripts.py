"""The launch scripts, started as a user starts them, before a Slurm that only notes what it is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.mcore.forks import warm

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"


TOKENIZER = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "meta-llama/Meta-Llama-3-8B"]
"""Of the hub: its vocabulary is not known here."""


def words(recipe: str) -> list[str]:
    """A recipe's, and a tokenizer's."""
    lines = (LAUNCH / "recipes" / f"{recipe}.args").read_text().splitlines()
    return [*(word for line in lines for word in line.split("#")[0].split()), *TOKENIZER]


def submit(folder: Path, *arguments: str, script: str = "submit.sh", known: str = "") -> subprocess.CompletedProcess[str]:
    """A script before a Slurm that knows the jobs `known`. Its sbatch notes that it was called, and fails for a later stage,
    or with what stands in the folder's file `answer`."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    fails = f"[ ! -e {folder}/answer ] || {{ cat {folder}/answer >&2; exit 1; }}\n"
    fails += 'case "$*" in --test-only*) ;; *kill-on-invalid*) exit 1 ;; esac'
    for name, text in (("sbatch", f'echo "$@" >> {folder}/queued\n{fails}\necho 7'), ("squeue", f"printf '{known}'")):
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = [str(LAUNCH / script), "--run", str(folder / "run"), *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHON"} | {"PATH": path, **warm()}
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)


def refused(folder: Path, *arguments: str) -> str:
    done = submit(folder, *arguments)
    assert done.returncode != 0
    assert not (folder / "queued").exists()
    assert not (folder / "run").exists()
    return done.stderr


def common(script: str, *arguments: str, **variables: str) -> str:
    """What a line of bash prints that has common.sh."""
    command = ["bash", "-euc", f'source "{LAUNCH}/common.sh"; {script}', "bash", *arguments]
    return subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=True).stdout
