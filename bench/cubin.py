"""What a compiled kernel is made of, read from its cubin with the tools that ship with Triton."""

import re
import subprocess
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
TENSOR_CORE = re.compile(r"[A-Z]*MMA$")  # HMMA (sm_80), HGMMA (sm_90), UTCHMMA (sm_100), IMMA, DMMA
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")


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


def facts(binary: bytes) -> dict:
    """Registers, bytes of stack and instruction counts of a cubin with one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        text = run(tool("cuobjdump"), "-res-usage", "-sass", file.name)
    resources = RESOURCES.search(text)
    return {"registers": int(resources[1]), "stack": int(resources[2])} | instruction_counts(text)


def instruction_counts(text: str) -> dict:
    """Counts by kind in a disassembly; 128 means 16 bytes per thread, bulk a tensor or block copy by the copy engine."""
    counts = Counter(INSTRUCTION.findall(text))

    def total(*prefixes: str, wide: bool | None = None) -> int:
        return sum(n for op, n in counts.items() if op.split(".")[0] in prefixes and (wide is None or (".128" in op) == wide))

    mma: Counter[str] = Counter()
    for op, n in counts.items():
        if TENSOR_CORE.match(op.split(".")[0]):
            mma[op.split(".")[0]] += n
    return {
        "instructions": sum(n for op, n in counts.items() if op.split(".")[0] not in ("NOP", "BRA")),
        "spill_ops": total("LDL", "STL"),
        "mma": dict(sorted(mma.items())),
        "loads_128": total("LDG", wide=True),
        "loads_other": total("LDG", wide=False),
        "async_128": total("LDGSTS", wide=True),
        "async_other": total("LDGSTS", wide=False),
        "bulk": total("UTMALDG", "UBLKCP"),
        "stores_128": total("STG", wide=True),
        "stores_other": total("STG", wide=False),
    }
