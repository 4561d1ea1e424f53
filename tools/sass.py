"""What can be read off a kernel's machine code."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections import defaultdict
from itertools import accumulate, pairwise
from pathlib import Path

__all__ = ["listings", "machine_code", "overwritten_factors", "raw_descriptors"]

_SECTION = struct.Struct("<IIQQQQIIQQ")
"""Of an ELF file of 64 bits: name, type, flags, address, place in the file, size, and four more."""
_INSTRUCTION_BYTES = 16
_LISTED = re.compile(r"\s+/\*[0-9a-f]{4,}\*/")
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z0-9_.]+)\s*(.*?)\s*;", re.MULTILINE)
_MULTIPLIES = re.compile(r" [HQ]GMMA\b")
"""In warp groups; most kernels do not, and need not be followed."""
_NUMBER = re.compile(r"-?(?:0x[0-9a-f]+|\d+)")
_REGISTER = re.compile(r"UR(\d+)")
_START = "0x400"
"""Of a program's shared memory in its window, behind what the system keeps."""
_UNKNOWN, _RAW, _CUT, _UNWRITTEN = "unknown", "raw", "cut", "unwritten"
_CUTTING = ("USHF", "USGXT", "ULOP3", "UBFE", "UPRMT")
_ADDING = ("UIADD3", "ULEA", "USEL", "UIMAD")
_Held = defaultdict[str, frozenset[str]]
"""What may be in uniform registers."""
_FACTOR_REGISTERS = 4
"""Of each thread, that hold a product's first factor."""
_MOST_GROUPS = 8
"""Of products that are told apart; no wait leaves more under way."""
_Flying = tuple[frozenset[int], ...]
"""Registers of factors that products under way may still read: those of each group of products, the oldest first, and
at last those of the group that is not closed."""


def machine_code(cubin: bytes) -> bytes:
    """The instructions of an ELF file."""
    (first,) = struct.unpack_from("<Q", cubin, 0x28)
    count, of_names = struct.unpack_from("<HH", cubin, 0x3C)
    sections = [_SECTION.unpack_from(cubin, first + i * _SECTION.size) for i in range(count)]
    names = sections[of_names][4]
    code = [cubin[start : start + size] for name, _, _, _, start, size, *_ in sections
            if cubin.startswith(b".text.", names + name)]  # fmt: skip
    return b"".join(code)


def listings(codes: list[bytes], architecture: str, nvdisasm: Path) -> list[str]:
    """The instructions of each of `codes`, a line each. They come out of one run, since nvdisasm takes a third of a
    second to begin; so their addresses run on from one to the next."""
    if not codes:
        return []
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        command = [str(nvdisasm), "--binary", architecture, "--no-vliw", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [line for line in text.splitlines() if _LISTED.match(line)]
    ends = accumulate((len(code) // _INSTRUCTION_BYTES for code in codes), initial=0)
    found = ["\n".join(lines[start:end]) for start, end in pairwise(ends)]
    assert len(lines) * _INSTRUCTION_BYTES == sum(map(len, codes)), "a line for each instruction"
    return found


def raw_descriptors(code: str) -> list[str]:
    """Products of warp groups whose descriptor holds the address of shared memory as it is, or comes of a register that
    nothing has written; where one is, the kernel multiplies what lies elsewhere, or faults.

    A descriptor holds an address without its last four bits. ptxas 12.8, which triton 3.6 and 3.7 bring along, forgets
    to cut them off for some products behind an `if`, and forgets the address where descriptors of two layouts share it
    (docs/log.md). `code` is a listing; uniform registers are followed in the order of the listing and along
    jumps forward.
    """
    if not _MULTIPLIES.search(code):
        return []
    held: _Held = defaultdict(lambda: frozenset({_UNWRITTEN}))
    jumped: defaultdict[int, list[_Held]] = defaultdict(list)
    """What is held by those who jump, by where to."""
    found = []
    for place, operation, operands in _INSTRUCTION.findall(code):
        for before in jumped.pop(int(place, 16), []):
            for name in held.keys() | before.keys():
                held[name] |= before[name]
        words = [word.strip().removesuffix(".reuse") for word in operands.split(",")]
        if operation.startswith(("HGMMA", "QGMMA")):
            if any(held[name] & {_RAW, _UNWRITTEN} for name in _descriptor_registers(words, operands)):
                found.append(f"{place}: {operation} {operands}")
        elif operation.startswith("BRA"):
            jumped[int(words[-1], 16)].append(held.copy())
        elif _REGISTER.fullmatch(words[0]):
            _follow(operation, words, held)
    return found


def overwritten_factors(code: str) -> list[str]:
    """Instructions that write into registers from which a product of warp groups that is under way may still read its
    first factor: what it multiplies then is a matter of luck.

    Triton 3.6 and 3.7 leave a product under way at the end of a loop's round, and load the next factor into the same
    registers (docs/log.md). `code` is a listing; all ways through it are followed.
    """
    if not _MULTIPLIES.search(code):
        return []
    coming: dict[int, _Flying] = {}
    found: set[str] = set()
    while True:
        before = dict(coming)
        flying: _Flying = (frozenset(),)
        for place, operation, operands in _INSTRUCTION.findall(code):
            flying = _both(flying, coming.get(int(place, 16), (frozenset(),)))
            if frozenset[int]().union(*flying) & _written(operation, operands):
                found.add(f"{place}: {operation} {operands}")
            flying = _after(operation, operands, flying)
            if operation.startswith("BRA"):
                target = int(operands.split(",")[-1], 16)
                coming[target] = _both(coming.get(target, (frozenset(),)), flying)
        if coming == before:
            return sorted(found)


def _after(operation: str, operands: str, flying: _Flying) -> _Flying:
    if operation.startswith(("HGMMA", "QGMMA")):
        factor = re.search(r"\bR(\d+), gdesc", operands)
        more = range(int(factor[1]), int(factor[1]) + _FACTOR_REGISTERS) if factor else ()
        flying = (*flying[:-1], flying[-1].union(more))
        flying = (*flying, frozenset()) if "gsb0" in operands else flying
        surplus = max(0, len(flying) - _MOST_GROUPS)  # a loop without a wait would have ever more of them
        return (frozenset[int]().union(*flying[: surplus + 1]), *flying[surplus + 1 :])
    if operation.startswith("WARPGROUP.DEPBAR"):
        return flying[-1 - int(operands.split(",")[-1], 16) :]
    return flying


def _both(one: _Flying, other: _Flying) -> _Flying:
    """What may be under way where two ways meet; the groups that are not closed are the same one."""
    longest = max(len(one), len(other))
    padded = ((frozenset[int](),) * (longest - len(ways)) + ways for ways in (one, other))
    return tuple(a | b for a, b in zip(*padded, strict=True))


def _written(operation: str, operands: str) -> frozenset[int]:
    """Registers that an instruction other than a product writes."""
    target = re.match(r"R(\d+)(?:,|$)", operands)
    if target is None or operation.startswith(("HGMMA", "QGMMA")):
        return frozenset()
    wide = re.search(r"\.(64|128|M88\.[24]|WIDE)\b", operation)
    count = {"64": 2, "128": 4, "M88.2": 2, "M88.4": 4, "WIDE": 2}[wide[1]] if wide else 1
    return frozenset(range(int(target[1]), int(target[1]) + count))


def _descriptor_registers(words: list[str], operands: str) -> list[str]:
    """Two for each factor; where the first factor is in registers, only the second pair is looked at."""
    first = re.search(r"gdesc\[UR(\d+)\]", operands)
    if first is None:
        return []
    both = "gdesc" in words[1]
    return [f"UR{int(first[1]) + i}" for i in (range(4) if both else (2, 3))]


def _follow(operation: str, words: list[str], held: _Held) -> None:
    """What the instruction leaves in its uniform register, or its pair of them."""

    def value(word: str) -> frozenset[str]:
        if word in ("URZ", "RZ") or _NUMBER.fullmatch(word):
            return frozenset()
        word = word.removeprefix("-")
        return held[word] if _REGISTER.fullmatch(word) else frozenset({_UNKNOWN})

    target, base = words[0], operation.split(".")[0]
    sources = [word for word in words[1:] if not word.startswith(("UP", "!UP"))]
    joined = frozenset[str]().union(*map(value, sources))
    if base == "UMOV":
        held[target] = frozenset({_START}) if sources[0] == _START else value(sources[0])
    elif base == "ULEA" and _START in joined:  # with the number of the program in its cluster above
        held[target] = frozenset({_RAW})
    elif base in _CUTTING:
        held[target] = frozenset({_CUT}) if joined & {_RAW, _CUT} else joined
    elif base in _ADDING:
        held[target] = joined
        if ".64" in operation:
            upper = [f"UR{int(match[1]) + 1}" for word in sources if (match := _REGISTER.fullmatch(word))]
            held[_next(target)] = frozenset[str]().union(*map(value, upper))
    else:
        held[target] = frozenset({_UNKNOWN})
        if ".64" in operation:
            held[_next(target)] = frozenset({_UNKNOWN})


def _next(register: str) -> str:
    return f"UR{int(register[2:]) + 1}"
