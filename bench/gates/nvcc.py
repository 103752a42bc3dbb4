"""csrc compiled by nvcc for the compile gate: registers, spills and shared memory as ptxas reports them, instruction counts from the disassembly."""

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from smi.csrc import build

from . import cubin

ARCHITECTURES = ("sm_80", "sm_90a")
GROUPS = {"csrc": build.ATTENTION, "cutlass": build.LINEAR}  # what is compiled together, and begins the names of its kernels
ENTRY = re.compile(r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame.*?Used (\d+) registers([^\n]*)", re.S)
SHARED = re.compile(r"(\d+) bytes smem")


def group_of(name: str) -> str | None:
    """The group of a kernel's name, None where nvcc does not compile it."""
    return next((group for group in GROUPS if name.startswith(f"{group}/")), None)


def found(group: str = "csrc") -> bool:
    """Whether there is an nvcc that the build would use and, for "cutlass", CUTLASS's headers."""
    return build.nvcc() is not None and (not GROUPS[group].cutlass or build.cutlass() is not None)


def versions(group: str) -> dict[str, str]:
    """Versions of what a group is compiled by, for example nvcc 13.0.88."""
    compiler = {"nvcc": re.search(r"V([\d.]+)", cubin.run(build.nvcc(), "--version"))[1]}
    return compiler | ({"cutlass": ".".join(map(str, build.cutlass_version()))} if GROUPS[group].cutlass else {})


def sources(group: str) -> list[Path]:
    """What is compiled of csrc/cuda: the kernels are named "GROUP/FILE/KERNEL"."""
    return build.sources(GROUPS[group])


def architectures(source: Path) -> list[str]:
    """Those of ARCHITECTURES that a source is for."""
    only = [f"sm_{architecture.replace('.', '')}" for architecture in library_of(source).architectures]
    return [architecture for architecture in ARCHITECTURES if not only or architecture in only]


def library_of(source: Path) -> build.Library:
    return next(library for library in GROUPS.values() if source.stem.startswith(library.name))


def prefix(source: Path) -> str:
    """What the names of its kernels begin with, for example csrc/attention_64."""
    return next(f"{group}/{source.stem}" for group, library in GROUPS.items() if library == library_of(source))


def compile_one(source: Path, architecture: str, known: dict[str, dict] | None = None) -> dict[str, dict]:
    """{"group/file/kernel": facts} for every kernel in one source for one architecture. known: facts of earlier ones, as in cubin.facts."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernels.cubin"
        command = [build.nvcc(), *build.flags(library_of(source)), "-cubin", f"-arch={architecture}", "-Xptxas", "-v", "-o", str(binary), str(source)]
        report = parse_report(subprocess.run(command, check=True, capture_output=True, text=True).stderr)
        codes = cubin.digests(binary.read_bytes())
        names = {mangled: f"{prefix(source)}/{short_name(mangled)}" for mangled in report}
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
    name = re.sub(r"^void cutlass::device_kernel<smi::LinearGemm<(.*) >::Kernel>\(.*\)$", r"\1", name)
    return re.sub(r"^void |smi::|cutlass::|\(anonymous namespace\)::|\((?:int|bool|unsigned int)\)|\([^()]*\)$", "", name)
