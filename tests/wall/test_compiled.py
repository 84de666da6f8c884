"""The kernels are compiled for Hopper and Blackwell without a GPU: what the assembler says of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest

COMPILED = """
import json, sys
from megatron_lighthouse.kernels.ahead_of_time import compile_wall
capability, dtype, key_dim, value_dim, scalar = json.loads(sys.argv[1])
print(json.dumps([tuple(x) for x in compile_wall(capability, dtype, key_dim, value_dim, scalar)]))
"""
SPILLED = 2816
"""Bytes. Tiles are those that were fastest on Hopper; on Blackwell (not timed) keys with scalar gates spill 2,720."""
SHARED = 227 * 1024
"""Bytes that Hopper and Blackwell have for a block."""


def reported(script: str, given: Sequence[object]) -> list[Any]:
    # in a process of its own: the interpreter, which the other tests run under, is chosen at import
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script, json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return found


NAMES = [
    *("wall_prepare", "wall_suffix_totals", "wall_suffix_sums"),
    *("wall_decay_totals", "wall_decay", "wall_decay_backward", "wall_crossing", "wall_crossing_backward"),
    *("wall_forward", "wall_near_backward", "wall_queries_backward", "wall_keys_backward"),
]


ROWS = """
import json, sys
from megatron_lighthouse.kernels.ahead_of_time import compile_wall_rows
from megatron_lighthouse.lighthouse.geometry import Geometry
capability, levels, pooling = json.loads(sys.argv[1])
reports = compile_wall_rows(capability, Geometry(98304, levels, pooling, 1536, 128), "bf16", 128)
print(json.dumps([tuple(x) for x in reports]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("given", [(90, 3, 4), (100, 3, 4), (90, 3, 8)], ids=str)
def test_what_gathers_rows_for_it_compiles_and_does_not_spill(given: tuple[int, ...]) -> None:
    reports = reported(ROWS, given)
    assert [name for name, *_ in reports] == [f"lighthouse_gather_{way}_decayed" for way in ("forward", "backward")]
    assert all(spilled == 0 and 0 < registers <= 255 for _, registers, _, spilled in reports)


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [
        *((capability, *layer) for layer in (("bf16", 128, 128, False), ("bf16", 80, 64, True)) for capability in (90, 100)),
        # of these ptxas 12.8 made wrong code: see `near_constants`
        *((90, "bf16", dim, 64, False) for dim in (64, 128)),
        (90, "fp16", 64, 64, False),
    ],
    ids=str,
)
def test_compiles(given: tuple[int, str, int, int, bool]) -> None:
    capability, reports = given[0], reported(COMPILED, given)
    assert [name for name, *_ in reports] == NAMES
    for kernel, registers, shared_bytes, spilled_bytes in reports:
        print(f"sm_{capability} {kernel}: {registers} registers, {shared_bytes} bytes shared, {spilled_bytes} spilled")
        assert spilled_bytes <= SPILLED, kernel
        assert 0 < registers <= 255
        assert shared_bytes <= SHARED
