"""What is read of descriptors in machine code: shortened from what ptxas 12.8 made of Wall's backward at 64 channels."""

from __future__ import annotations

import pytest

from megatron_lighthouse.kernels.descriptors import problem, products

SHARED = 0x8000
CODE = """
.text.kernel:
        UMOV UR4, 0x400 ;
        S2UR UR5, SR_CgaCtaId ;
        ULEA UR4, UR5, UR4, 0x18 ;
        USHF.R.U32.HI UR6, URZ, 0x4, UR4 ;
        USGXT.U32 UR9, UR6, 0xe ;
        UMOV UR8, URZ ;
        UIADD3 UR20, UP0, LOW, 0x40, URZ ;
        UIADD3.X UR24, HIGH, -0x7fffffe0, URZ, UP0, !UPT ;
        IMAD.U32 R220, RZ, RZ, UR20 ;
        IMAD.U32 R221, RZ, RZ, UR24 ;
        STL [R1+0x8], R220 ;
        UIADD3 UR20, UR20, 0x1, URZ ;
        LDL R2, [R1+0x8] ;
.L_x_0:
        R2UR UR38, R2 ;
        R2UR UR39, R221 ;
        HGMMA.64x32x16.F32.BF16 R24, R104, gdesc[UR36].tnspB, R24 ;
        UIADD3.64 UR38, UR38, 0x1fe, URZ ;
        HGMMA.64x32x16.F32.BF16 R24, R100, gdesc[UR36].tnspB, R24, gsb0 ;
    @P3 BRA `(.L_x_0) ;
        EXIT ;
"""


def code(low: str, high: str, instead: tuple[str, str] = ("", "")) -> str:
    lines = CODE.replace("LOW", low).replace("HIGH", high).replace(*instead).splitlines()
    return "\n".join(f"/*{16 * i:04x}*/ {line}" if line.endswith(";") else line for i, line in enumerate(lines))


def test_constants_are_carried_through_loops_and_the_stack() -> None:
    found = products(code("UR9", "UR8"))
    assert [product.descriptor for product in found] == [0x8000002000000080, 0x800000200000027E]
    assert problem(code("UR9", "UR8"), SHARED) is None


def test_a_descriptor_that_is_made_of_a_wrong_register_is_found() -> None:
    message = problem(code("UR4", "UR4"), SHARED)  # as ptxas did: the place of shared memory instead
    assert message is not None
    assert "at 0x4400 and 0x4200 further, of 0x8000 bytes" in message


def test_one_that_begins_beyond_the_end_is_found() -> None:
    assert problem(code("UR9", "UR8"), 0x3000) is None
    assert "at 0x27e0" in str(problem(code("UR9", "UR8"), 0x2000))


@pytest.mark.parametrize(
    "instead",
    [
        ("LDL R2, [R1+0x8]", "LDL R2, [R1+0xc]"),
        ("UMOV UR8, URZ", "@UP1 UMOV UR8, URZ"),
        ("S2UR UR5, SR_CgaCtaId", "ULDC UR5, c[0x0][0x28]"),
    ],
    ids=["another place", "under a condition", "not a constant"],
)
def test_what_is_not_known_is_not_judged(instead: tuple[str, str]) -> None:
    found = products(code("UR9", "UR8", instead))
    assert [product.descriptor for product in found] == [None, None]


def test_what_a_loop_changes_is_not_known_in_it() -> None:
    changed = code("UR9", "UR8", ("UIADD3.64 UR38, UR38", "MOV R2, 0x5 ;\n        UIADD3.64 UR38, UR38"))
    assert products(changed)[0].descriptor is None
