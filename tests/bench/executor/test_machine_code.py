"""The scan of machine code on texts: registers of a wgmma in flight."""

import pytest

from bench.executor.machine_code import Scan, instructions

pytestmark = pytest.mark.fast

LOOP = """
        /*0100*/                   HGMMA.64x16x16.F32.BF16 R24, R4, gdesc[UR4], R24, gsb0 ;
        /*0110*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0120*/              @!P0 LDS.128 R4, [R40] ;
        /*0130*/                   FADD R41, R24, R42 ;
        /*0140*/               @P0 BRA 0x100 ;
"""


def hazards(text: str) -> list[str]:
    return Scan(instructions(text)).hazards


def test_registers_are_free_after_the_wait():
    scan = Scan(instructions(LOOP))
    assert not scan.hazards
    assert scan.counts == {"A in registers": 1, "waits for all": 1}


def test_registers_used_before_the_wait_are_found():
    late = LOOP.replace("DEPBAR.LE gsb0, 0x0", "DEPBAR.LE gsb0, 0x1")
    assert any("LDS.128 R4" in line and "writes R5" in line for line in hazards(late))
    assert any("FADD R41" in line and "uses R24" in line for line in hazards(late))


def test_a_loop_is_gone_through_twice():
    """What the end of one step leaves in flight meets the beginning of the next."""
    text = """
        /*0100*/                   LDS.64 R6, [R40] ;
        /*0110*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0120*/                   HGMMA.64x16x16.F32.BF16 R24, R4, gdesc[UR4], R24, gsb0 ;
        /*0130*/               @P0 BRA 0x100 ;
    """
    assert any(line.startswith("0100") and "writes R6" in line for line in hazards(text))
    assert not hazards(text.replace("@P0 BRA 0x100", "EXIT"))
