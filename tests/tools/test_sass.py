"""What is read off machine code: descriptors of products, as ptxas 12.8 made them."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from sass import listings, machine_code, overwritten_factors, raw_descriptors

BASE = """
        /*0100*/                   S2UR UR4, SR_CgaCtaId ;
        /*0110*/                   UMOV UR12, 0x400 ;
        /*0120*/                   ULEA UR12, UR4, UR12, 0x18 ;
"""
RIGHT = """
        /*0200*/                   USHF.R.U32.HI UR6, URZ, 0x4, UR12 ;
        /*0210*/                   USGXT.U32 UR6, UR6, 0xe ;
        /*0220*/                   UMOV UR7, 0x40000040 ;
        /*0230*/                   HGMMA.64x16x16.F32.BF16 R88, R24, gdesc[UR4].tnspB, R88 ;
        /*0240*/                   UIADD3.64 UR6, UR6, 0x20, URZ ;
        /*0250*/                   HGMMA.64x16x16.F32.BF16 R88, R28, gdesc[UR4].tnspB, R88 ;
"""
WRONG = """
        /*0300*/                   UIADD3 UR4, UP0, UR12, 0x20, URZ ;
        /*0310*/                   UIADD3.X UR5, UR12, -0x3ffffff0, URZ, UP0, !UPT ;
        /*0320*/                   UMOV UR6, UR4 ;
        /*0330*/                   UMOV UR7, UR5 ;
        /*0340*/                   HGMMA.64x16x16.F32.BF16 R88, R28, gdesc[UR4].tnspB, R88 ;
"""
FORGOTTEN = """
        /*0300*/                   UIADD3 UR34, UP0, UR34, 0x20, URZ ;
        /*0310*/                   UIADD3.X UR35, UR35, -0x3ffffff0, URZ, UP0, !UPT ;
        /*0320*/                   HGMMA.64x16x16.F32.BF16 R88, R28, gdesc[UR32].tnspB, R88 ;
"""
BOTH_SHARED = """
        /*0400*/                   UIADD3 UR8, UR12, 0x8000, URZ ;
        /*0410*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
"""


def test_descriptors_of_cut_addresses_are_right() -> None:
    assert raw_descriptors(BASE + RIGHT) == []


@pytest.mark.parametrize("code", [WRONG, BOTH_SHARED, FORGOTTEN])
def test_a_descriptor_of_an_address_as_it_is_or_of_none_is_found(code: str) -> None:
    (found,) = raw_descriptors(BASE + RIGHT + code)
    assert "HGMMA" in found


def test_the_first_pair_of_a_factor_in_registers_is_nobodys() -> None:
    """Whatever it holds: the product reads the second pair."""
    moved = RIGHT.replace("/*0230*/", "/*0228*/                   UMOV UR4, UR12 ;\n        /*0230*/")
    assert raw_descriptors(BASE + moved) == []


@pytest.mark.parametrize(("target", "wrong"), [("0x200", 0), ("0x230", 2)])
def test_a_jump_past_the_address_brings_none_along(target: str, wrong: int) -> None:
    jump = f"        /*0130*/               @P2 BRA {target} ;\n"
    assert len(raw_descriptors(BASE + jump + RIGHT)) == wrong


ROUND = """
        /*0100*/                   LDS.U16 R93, [R11+UR4] ;
        /*0110*/                   I2F.BF16.U8 R88, R93 ;
        /*0120*/                   HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR20], R24 ;
        /*0130*/                   HGMMA.64x128x16.F32.BF16 R24, R92, gdesc[UR20], R24, gsb0 ;
"""
WAIT = "        /*0140*/                   WARPGROUP.DEPBAR.LE gsb0, {} ;\n"
AGAIN = "        /*0150*/              @!P6 BRA 0x100 ;\n"


def test_a_factor_that_the_next_round_loads_while_a_product_reads_it_is_found() -> None:
    found = overwritten_factors(ROUND + AGAIN)
    assert [place.partition(":")[0] for place in found] == ["0100", "0110"]


@pytest.mark.parametrize(("left", "wrong"), [("0x0", 0), ("0x1", 2)])
def test_behind_a_wait_for_the_product_the_registers_are_free(left: str, wrong: int) -> None:
    """A wait that leaves one group of products under way leaves this one."""
    assert len(overwritten_factors(ROUND + WAIT.format(left) + AGAIN)) == wrong


def test_a_factor_is_written_before_its_product_is_begun() -> None:
    assert overwritten_factors(ROUND) == []


@pytest.mark.parametrize(
    ("instruction", "wrong"),
    [
        ("LDSM.16.M88.4 R85, [R0]", 1),
        ("LDSM.16.M88.4 R84, [R0]", 0),
        ("LDS.64 R95, [R0]", 1),
        ("IMAD.WIDE R87, R2, R3, R4", 1),
        ("LDGSTS.E.64 [R90], desc[UR20][R12.64]", 0),
        ("STS [R90], R91", 0),
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], R24, gsb0", 0),
    ],
)
def test_what_an_instruction_writes(instruction: str, wrong: int) -> None:
    assert len(overwritten_factors(f"{ROUND}        /*0140*/                   {instruction} ;\n")) == wrong


def elf(**sections: bytes) -> bytes:
    """As much of a file as is looked at: `_` in a section's name stands for a dot, and `name` holds the names."""
    names = b"\0" + b"".join(name.replace("_", ".").encode() + b"\0" for name in (*sections, "name"))
    parts = [*sections.values(), names]
    starts = [64 + sum(map(len, parts[:i])) for i in range(len(parts))]
    table = b""
    for name, start, part in zip((*sections, "name"), starts, parts, strict=True):
        at = names.index(b"\0" + name.replace("_", ".").encode() + b"\0") + 1
        table += struct.pack("<IIQQQQIIQQ", at, 1, 0, 0, start, len(part), 0, 0, 0, 0)
    head = bytearray(64)
    struct.pack_into("<Q", head, 0x28, 64 + sum(map(len, parts)))
    struct.pack_into("<HH", head, 0x3C, len(parts), len(sections))
    return bytes(head) + b"".join(parts) + table


def test_instructions_are_those_of_all_functions() -> None:
    assert machine_code(elf(_nv_info=b"12", _text_first=b"abc", _text_second=b"de", _text=b"none")) == b"abcde"


LOAD = struct.pack("<QQ", 0x00000A00FF017B82, 0x000E220000000800)
EXIT = struct.pack("<QQ", 0x000000000000794D, 0x000FEA0003800000)


def test_kernels_that_are_listed_together_are_told_apart() -> None:
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    first, second, third = listings([LOAD + EXIT, EXIT, LOAD], "SM90a", tool)
    assert "LDC R1" in first.splitlines()[0]
    assert "EXIT" in first.splitlines()[1]
    assert "/*0020*/" in second
    assert "EXIT" in second
    assert "LDC R1" in third
    assert "EXIT" not in third
    assert listings([], "SM90a", tool) == []
