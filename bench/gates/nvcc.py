"""csrc compiled by nvcc for the compile gate: registers, spills and shared memory as ptxas reports them, instruction counts from the disassembly."""

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from smi.csrc import build

from . import cubin

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
ARCHITECTURES = ("sm_80", "sm_90a")
ENTRY = re.compile(r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame.*?Used (\d+) registers([^\n]*)", re.S)
SHARED = re.compile(r"(\d+) bytes smem")


def found() -> bool:
    """Whether there is an nvcc that the build would use."""
    return build.nvcc() is not None


def version() -> str:
    """Version of nvcc, for example 13.0.88."""
    return re.search(r"V([\d.]+)", cubin.run(build.nvcc(), "--version"))[1]


def sources() -> list[Path]:
    """What is compiled: csrc/cuda/*.cu, whose kernels are named "csrc/FILE/KERNEL"."""
    return sorted(SOURCES.glob("*.cu"))


def compile_one(source: Path, architecture: str, known: dict[str, dict] | None = None) -> dict[str, dict]:
    """{"csrc/file/kernel": facts} for every kernel in one source for one architecture. known: facts of earlier ones, as in cubin.facts."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernels.cubin"
        command = [build.nvcc(), *build.FLAGS, "-I", str(SOURCES), "-cubin", f"-arch={architecture}", "-Xptxas", "-v", "-o", str(binary), str(source)]
        report = parse_report(subprocess.run(command, check=True, capture_output=True, text=True).stderr)
        codes = cubin.digests(binary.read_bytes())
        names = {mangled: f"csrc/{source.stem}/{short_name(mangled)}" for mangled in report}
        before = {mangled: (known or {}).get(name, {}) for mangled, name in names.items()}
        same = all(before[mangled].get("code") == codes[mangled] for mangled in report)
        text = "" if same else cubin.run(cubin.tool("cuobjdump"), "-sass", binary)

    def counts(mangled: str) -> dict:
        return {key: before[mangled][key] for key in cubin.COUNTED} if same else cubin.instruction_counts(code_of(mangled, text))

    return {names[mangled]: facts | counts(mangled) | {"code": codes[mangled]} for mangled, facts in report.items()}


def parse_report(report: str) -> dict[str, dict]:
    """Registers, stack and static shared memory by mangled kernel name, from what ptxas -v prints."""
    return {
        mangled: {"registers": int(registers), "stack": int(stack), "shared": int(shared[1]) if (shared := SHARED.search(rest)) else 0}
        for mangled, stack, registers, rest in ENTRY.findall(report)
    }


def code_of(mangled: str, text: str) -> str:
    """The part of a disassembly that belongs to one kernel."""
    parts = re.split(r"Function : (\w+)", text)
    return dict(zip(parts[1::2], parts[2::2], strict=True)).get(mangled, "")


def short_name(mangled: str) -> str:
    """Demangled kernel name with template arguments, without return type and parameters; the mangled one where no demangler is found."""
    demangler = shutil.which("cu++filt") or shutil.which("c++filt")
    if not demangler:
        return mangled
    name = cubin.run(demangler, mangled).strip()
    return re.sub(r"^void |smi::|\(anonymous namespace\)::|\((?:int|bool|unsigned int)\)|\([^()]*\)$", "", name)
