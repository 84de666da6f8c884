"""The kernels are compiled for Hopper and Blackwell without a GPU: what the assembler says of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

COMPILED = """
import json, sys
from megatron_lighthouse.kernels.ahead_of_time import compile_parallax
given = json.loads(sys.argv[1])
print(json.dumps([tuple(x) for x in compile_parallax(*given)]))
"""
SPILLED = 1024
"""Bytes. On Hopper that of dk and dv spills most, at the diagonal: next to nothing in the loop over whole tiles."""
SHARED = 227 * 1024
"""Bytes that Hopper and Blackwell have for a block."""


@pytest.mark.slow
@pytest.mark.parametrize("capability", [90, 100], ids="sm_{}".format)
@pytest.mark.parametrize(
    "layer", [("bf16", 128, None, True), ("bf16", 64, None, False), ("fp16", 80, 512, True, True)], ids=str
)
def test_compiles(capability: int, layer: tuple[object, ...]) -> None:
    # in a process of its own: the interpreter, which the other tests run under, is chosen at import
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILED, json.dumps([capability, *layer])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    reports = json.loads(done.stdout.splitlines()[-1])
    assert [name for name, *_ in reports] == ["parallax_forward", "parallax_queries_backward", "parallax_keys_backward"]
    for kernel, registers, shared_bytes, spilled_bytes in reports:
        print(f"sm_{capability} {kernel}: {registers} registers, {shared_bytes} bytes shared, {spilled_bytes} spilled")
        assert spilled_bytes <= SPILLED, kernel
        assert 0 < registers <= 255
        assert shared_bytes <= SHARED
