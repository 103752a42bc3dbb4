"""What the compiler made of a launched kernel, as far as its time depends on it."""

import re
import tempfile
from typing import Any, NamedTuple

from ..gates import cubin

ADDRESS = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
TARGET = re.compile(r"0x([0-9a-f]+)\s*$")


class Code(NamedTuple):
    """Of one kernel. Instructions are those of one warp: all of the text, and those of its longest loop."""

    registers: int  # per thread
    shared: int  # bytes per program
    spills: int  # bytes of stack per thread
    warps: int
    instructions: int
    loop: int


_known: dict[str, Code] = {}  # by Triton's hash of the kernel


def of(compiled: Any) -> Code:
    """Of a kernel that Triton compiled."""
    if compiled.hash not in _known:
        _known[compiled.hash] = _read(compiled.asm["cubin"], compiled.metadata.shared, compiled.metadata.num_warps)
    return _known[compiled.hash]


def _read(binary: bytes, shared: int, warps: int) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        text = cubin.run(cubin.tool("cuobjdump"), "-res-usage", "-sass", file.name)
    resources = cubin.RESOURCES.search(text)
    assert resources, "cuobjdump names no resources"
    found = instructions_of(text)
    return Code(int(resources[1]), shared, int(resources[2]), warps, len(found), longest_loop(found))


def instructions_of(disassembly: str) -> list[tuple[int, str, str]]:
    """(address, name, operands) of every instruction that does something."""
    return [(int(address, 16), name, rest) for address, name, rest in ADDRESS.findall(disassembly) if name.split(".")[0] != "NOP"]


def longest_loop(instructions: list[tuple[int, str, str]]) -> int:
    """Instructions from the target of a branch backwards to the branch, at most. instructions: (address, name, operands) in order."""
    place, longest = {address: i for i, (address, _, _) in enumerate(instructions)}, 0
    for i, (_, name, rest) in enumerate(instructions):
        target = TARGET.search(rest) if name.split(".")[0] == "BRA" else None
        begins = place.get(int(target[1], 16), i) if target else i
        longest = max(longest, i - begins + 1 if begins < i else 0)
    return longest
