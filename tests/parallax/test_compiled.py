"""The kernels are compiled for Hopper and Blackwell without a GPU: what the assembler says of them."""

from __future__ import annotations

import pytest

from tests.compiled import compiled

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
    call = ("compile_parallax", capability, *layer)
    reports = compiled(call)[call]
    assert [name for name, *_ in reports] == ["parallax_forward", "parallax_queries_backward", "parallax_keys_backward"]
    for kernel, registers, shared_bytes, spilled_bytes in reports:
        print(f"sm_{capability} {kernel}: {registers} registers, {shared_bytes} bytes shared, {spilled_bytes} spilled")
        assert spilled_bytes <= SPILLED, kernel
        assert 0 < registers <= 255
        assert shared_bytes <= SHARED
