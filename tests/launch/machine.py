"""A machine of two H100s, as far as the launch scripts see it, and local.sh on it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.launch.scripts import LAUNCH

PYTHON = """#!/usr/bin/env bash
# in the place of Python: notes what is to run; trains by a line of log, but never dense on two processes
echo "$*" >>"$NOTED"
[[ $2 == torch.distributed.run ]] || exit 0
[[ "$* " != *"--nproc-per-node 2 "*"--attention dense --seq-length 98304 "* ]] || exit 1
for i in 1 2 3 4 5 6; do echo " iteration    $i/    6 | elapsed time per iteration (ms): 1000.0 | lm loss: 2.0E+00 |"; done
echo "[Rank 0] (after 2 iterations) memory (MB) | allocated: 900.00 | max allocated: 20480.00 | reserved: 1 |"
"""
NVIDIA_SMI = """#!/bin/sh
case "$*" in
    *name*) echo "NVIDIA H100 80GB HBM3" ;;
    -L) for gpu in 0 1; do echo "GPU $gpu: NVIDIA H100 80GB HBM3 (UUID: GPU-$gpu)"; done ;;
esac
"""


def local(machine: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    environment |= {"PATH": f"{machine}:{os.environ['PATH']}", "PYTHON": str(machine / "python"), "NOTED": f"{machine}/noted"}
    command = [str(LAUNCH / "local.sh"), "--cluster", "hgx-h100", "--recipe", "530m-98k", "--run", str(machine / "run")]
    return subprocess.run([*command, *arguments], env={**environment, **variables}, capture_output=True, text=True, cwd=machine)
