"""The kernels are compiled for Hopper and Blackwell without a GPU: what the assembler says of them."""

from __future__ import annotations

import pytest

from tests.compiled import compiled

SPILLED = 2816
"""Bytes. Tiles are those that were fastest on Hopper; on Blackwell (not timed) keys with scalar gates spill 2,720."""
SHARED = 227 * 1024
"""Bytes that Hopper and Blackwell have for a block."""


NAMES = [
    *("wall_prepare", "wall_suffix_totals", "wall_suffix_sums"),
    *("wall_decay_totals", "wall_decay", "wall_decay_backward", "wall_crossing", "wall_crossing_backward"),
    *("wall_between", "wall_between_backward"),
    *("wall_halves", "wall_halves_backward", "wall_halves_gates", "wall_halves_values", "wall_halves_sums", "wall_halves_sums"),
    *("wall_forward", "wall_near_backward", "wall_queries_backward", "wall_keys_backward"),
]


@pytest.mark.slow
@pytest.mark.parametrize("given", [(90, 3, 4), (100, 3, 4), (90, 3, 8)], ids=str)
def test_what_gathers_rows_for_it_compiles_and_does_not_spill(given: tuple[int, int, int]) -> None:
    capability, levels, pooling = given
    call = ("compile_wall_rows", capability, (98304, levels, pooling, 1536, 128), "bf16", 128)
    reports = compiled(call)[call]
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
    capability, call = given[0], ("compile_wall", *given)
    reports = compiled(call)[call]
    assert [name for name, *_ in reports] == NAMES
    for kernel, registers, shared_bytes, spilled_bytes in reports:
        print(f"sm_{capability} {kernel}: {registers} registers, {shared_bytes} bytes shared, {spilled_bytes} spilled")
        assert spilled_bytes <= SPILLED, kernel
        assert 0 < registers <= 255
        assert shared_bytes <= SHARED
