"""What a compiled kernel is made of, read from its cubin with the tools that ship with Triton."""

import hashlib
import re
import struct
import subprocess
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
TENSOR_CORE = re.compile(r"[A-Z]*MMA$")  # HMMA (sm_80), HGMMA (sm_90), UTCHMMA (sm_100), IMMA, DMMA
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")
COUNTED = (
    "instructions", "spill_ops", "mma", "loads_128", "loads_other", "async_128", "async_other", "bulk", "stores_128", "stores_other"
)  # fmt: skip


@cache
def tool(name: str) -> Path:
    """A program that Triton ships."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def run(*command: str | Path) -> str:
    """Standard output of a command; raises CalledProcessError with its errors."""
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def compiler_versions() -> dict[str, str]:
    """Versions of Triton and of the assemblers that it ships."""
    import triton

    return {"triton": triton.__version__} | {name: re.search(r"V([\d.]+)", run(tool(name), "--version"))[1] for name in ("ptxas", "ptxas-blackwell")}


def facts(binary: bytes, known: dict | None = None) -> dict:
    """Registers, bytes of stack and instruction counts of a cubin with one kernel, and a digest of its code. known: facts of an earlier cubin, whose
    instructions need not be counted again (that is most of the time) if it was the same code."""
    (code,) = digests(binary).values()
    same = bool(known) and known.get("code") == code
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        text = run(tool("cuobjdump"), "-res-usage", *(() if same else ("-sass",)), file.name)
    resources = RESOURCES.search(text)
    counted = {key: known[key] for key in COUNTED} if same else instruction_counts(text)
    return {"registers": int(resources[1]), "stack": int(resources[2])} | counted | {"code": code}


def digests(binary: bytes) -> dict[str, str]:
    """A digest of the machine code of every kernel in a cubin, by mangled name: of its ELF sections .text.NAME."""
    table, size, count, names = struct.unpack_from("<Q", binary, 0x28) + struct.unpack_from("<HHH", binary, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", binary, table + i * size) for i in range(count)]  # name, type, flags, address, offset, size
    strings = sections[names][4]
    found = {}
    for name, _, _, _, offset, length in sections:
        label = binary[strings + name : binary.index(b"\0", strings + name)].decode()
        if label.startswith(".text."):
            found[label.removeprefix(".text.")] = hashlib.sha256(binary[offset : offset + length]).hexdigest()[:16]
    return found


def instruction_counts(text: str) -> dict:
    """Counts by kind in a disassembly; 128 means 16 bytes per thread, bulk a tensor or block copy by the copy engine."""
    counts = Counter(INSTRUCTION.findall(text))

    def total(*prefixes: str, wide: bool | None = None) -> int:
        return sum(n for op, n in counts.items() if op.split(".")[0] in prefixes and (wide is None or (".128" in op) == wide))

    mma: Counter[str] = Counter()
    for op, n in counts.items():
        if TENSOR_CORE.match(op.split(".")[0]):
            mma[op.split(".")[0]] += n
    found = (
        sum(n for op, n in counts.items() if op.split(".")[0] not in ("NOP", "BRA")),
        total("LDL", "STL"),
        dict(sorted(mma.items())),
        total("LDG", wide=True),
        total("LDG", wide=False),
        total("LDGSTS", wide=True),
        total("LDGSTS", wide=False),
        total("UTMALDG", "UBLKCP"),
        total("STG", wide=True),
        total("STG", wide=False),
    )
    return dict(zip(COUNTED, found, strict=True))
