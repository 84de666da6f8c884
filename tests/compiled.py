"""What the assembler says of kernels that are compiled for GPUs which are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

SCRIPT = """
import json, sys
from megatron_lighthouse.kernels import ahead_of_time
from megatron_lighthouse.lighthouse.geometry import Geometry
found = []
for function, *given in json.loads(sys.argv[1]):
    given = [Geometry(*x) if isinstance(x, list) else x for x in given]
    found.append([*getattr(ahead_of_time, function)(*given)])
print(json.dumps(found))
"""

type Call = tuple[Any, ...]
"""The name of a function of kernels/ahead_of_time.py, and its arguments; of a geometry, its sizes."""


@cache
def compiled(*calls: Call) -> dict[Call, list[list[Any]]]:
    """By call, the reports of its kernels.

    All are compiled in one process of their own: the interpreter, which the other tests run under, is chosen at import.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    # what Triton says of its options is to be decided, and not left to its next release
    command = [sys.executable, "-W", "error::UserWarning:triton.knobs", "-c", SCRIPT, json.dumps(calls)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(calls, json.loads(done.stdout.splitlines()[-1]), strict=True))
