"""Builds the CUDA C++ of `cuda/` into libraries on torch's stable ABI: any Python, any torch from OLDEST_TORCH on.

When the package is installed where torch and nvcc are at hand (`pip install --no-build-isolation .`), for ARCHITECTURES or TORCH_CUDA_ARCH_LIST;
otherwise on first use, for the GPU that is there, into the user's cache. SMI_BUILD_CUDA=0 leaves them out of an installation.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from .cache import cache_folder, replace_file

FOLDER = Path(__file__).parent / "cuda"
BUILT = Path(__file__).parent / "_C.abi3.so"  # of ATTENTION, where it was installed
ARCHITECTURES = "8.0+PTX;9.0a"  # PTX: later GPUs compile it when they load it
OLDEST_TORCH = (2, 11)
OLDEST_NVCC = (12, 0)
SHIPPED = ["README.md", "cuda/*", "cpu/*", "autograd/*", "emulate/*"]  # package data: what a build on first use needs
FLAGS = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
# Without NDEBUG the compiler serialises the tensor-core instructions of CUTLASS's kernels; -w: CUTLASS's headers name deprecated vector types.
CUTLASS_FLAGS = ["-DNDEBUG", "--expt-relaxed-constexpr", "-w"]
CUTLASS = "nvidia-cutlass==4.2.0.0"  # what was compiled and is in the compile gate; headers only
OLDEST_CUTLASS = (4, 2)


class Library(NamedTuple):
    """What is compiled into one file: the sources `cuda/NAME*.cu` and bindings.cpp with SMI_NAME."""

    name: str
    module: str
    architectures: tuple[str, ...] = ()  # the only ones it is for; all where there are none
    cutlass: bool = False


ATTENTION = Library("attention", "_C")
LINEAR = Library("linear", "_linear", ("9.0a",), True)
LIBRARIES = (ATTENTION, LINEAR)


def installed(library: Library) -> Path:
    """Where the library is if it was installed with the package."""
    return BUILT if library == ATTENTION else BUILT.with_name(f"{library.module}.abi3.so")


def sources(library: Library) -> list[Path]:
    return sorted(FOLDER.glob(f"{library.name}*.cu"))


def flags(library: Library) -> list[str]:
    """nvcc's flags for the sources of a library, without architectures."""
    found = [*FLAGS, "-I", str(FOLDER), f"-DSMI_{library.name.upper()}"]
    return [*found, *CUTLASS_FLAGS, "-isystem", str(cutlass())] if library.cutlass else found


def cutlass() -> Path | None:
    """CUTLASS's headers: of CUTLASS_PATH, else those that the package nvidia-cutlass brings."""
    spec = find_spec("cutlass_library")
    places = [Path(place) / "source" / "include" for place in (spec.submodule_search_locations or [] if spec else [])]
    if os.environ.get("CUTLASS_PATH"):
        places = [Path(os.environ["CUTLASS_PATH"], "include"), Path(os.environ["CUTLASS_PATH"])]
    return next((place for place in places if (place / "cutlass" / "version.h").exists()), None)


def cutlass_version() -> tuple[int, ...]:
    text = (cutlass() / "cutlass" / "version.h").read_text()
    return tuple(int(re.search(rf"define CUTLASS_{part} +(\d+)", text)[1]) for part in ("MAJOR", "MINOR", "PATCH"))


def why_not(library: Library = ATTENTION) -> str | None:
    """Why the library cannot be built here, in one sentence; None if it can."""
    try:
        import torch
    except ImportError:
        return "torch is not installed where it would be built"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < OLDEST_TORCH:
        return f"it needs torch {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or later, this is {torch.__version__}"
    compiler = nvcc()
    if compiler is None:
        return "nvcc is neither on the PATH nor in CUDA_HOME"
    found = re.search(r"release (\d+)\.(\d+)", subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout)
    if found is None or tuple(map(int, found.groups())) < OLDEST_NVCC:
        return f"it needs nvcc {OLDEST_NVCC[0]}.{OLDEST_NVCC[1]} or later"
    if shutil.which("g++") is None:
        return "nvcc needs g++, which is not on the PATH"
    if library.cutlass and cutlass() is None:
        return f"CUTLASS's headers are not found: pip install --no-deps {CUTLASS}, or set CUTLASS_PATH"
    if library.cutlass and cutlass_version() < OLDEST_CUTLASS:
        return f"it needs CUTLASS {OLDEST_CUTLASS[0]}.{OLDEST_CUTLASS[1]} or later, found {'.'.join(map(str, cutlass_version()))}"
    return None


def nvcc() -> str | None:
    """The CUDA compiler: of CUDA_HOME, of the PATH, of the usual place."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [f"{home}/bin/nvcc" for home in homes if home] + [shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    return next((path for path in candidates if path and os.access(path, os.X_OK)), None)


def architecture_flags(architectures: str) -> list[str]:
    """nvcc's flags for a list as TORCH_CUDA_ARCH_LIST takes it: "8.0+PTX;9.0a"."""
    flags = []
    for entry in architectures.replace(" ", ";").split(";"):
        number = entry.removesuffix("+PTX").replace(".", "")
        if number:
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if number and entry.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def architectures_of(library: Library, architectures: str) -> str:
    """Those of a list as TORCH_CUDA_ARCH_LIST takes it that the library is for."""
    entries = architectures.replace(" ", ";").split(";")
    return ";".join(entry for entry in entries if not library.architectures or entry.removesuffix("+PTX") in library.architectures)


def compile_library(target: Path, architectures: str, library: Library = ATTENTION) -> None:
    """Compile every source, as many at once as there are processors, and link them into `target`. Raises RuntimeError with the compiler's words."""
    options = [*flags(library), "-I", str(torch_folder() / "include"), *architecture_flags(architectures_of(library, architectures))]
    files = [*sources(library), FOLDER / "bindings.cpp"]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        objects = [Path(folder) / f"{source.name}.o" for source in files]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            commands = [[nvcc(), *options, "-c", str(source), "-o", str(made)] for source, made in zip(files, objects, strict=True)]
            list(pool.map(run, commands))
        libraries = ["-L", str(torch_folder() / "lib"), "-lc10", "-ltorch_cpu", "-ltorch_cuda"]  # in the process already: no path is recorded
        link = [nvcc(), "-shared", "-Xcompiler", "-fPIC", *map(str, objects), *libraries]
        replace_file(target, lambda linked: run([*link, "-o", str(linked)]))


def torch_folder() -> Path:
    import torch

    return Path(torch.__file__).parent


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def cached_library(architecture: str, library: Library = ATTENTION) -> Path:
    """Where a build on first use for one architecture is kept; its name changes with the sources, the compiler and torch's version."""
    import torch

    words = hashlib.sha256(f"{architecture} {FLAGS} {torch.__version__} {library} {CUTLASS_FLAGS}".encode())
    for source in sorted(FOLDER.iterdir()):
        words.update(source.read_bytes())
    return cache_folder("csrc", words.hexdigest()[:16]) / f"smi_cuda_{library.name}.so"


def extensions() -> list:
    """`ext_modules` for setup.py: the libraries that can be built; of the others the reason, on standard error."""
    found = []
    for library in LIBRARIES:
        reason = "SMI_BUILD_CUDA=0" if os.environ.get("SMI_BUILD_CUDA") == "0" else why_not(library)
        if not reason and not architectures_of(library, wanted_architectures()):
            reason = f"it is for {', '.join(library.architectures)}, not for {wanted_architectures()}"
        if reason:
            print(f"smi: the CUDA library of {library.name} is left out: {reason}", file=sys.stderr)
            continue
        from setuptools import Extension

        found.append(Extension(f"smi.csrc.{library.module}", sources=[], py_limited_api=True))
    return found


def wanted_architectures() -> str:
    """What an installation is built for."""
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES


def commands() -> dict:
    """`cmdclass` for setup.py."""
    from setuptools.command.build_ext import build_ext

    class BuildLibrary(build_ext):
        def build_extension(self, extension) -> None:
            library = next(library for library in LIBRARIES if extension.name.endswith(library.module))
            compile_library(Path(self.get_ext_fullpath(extension.name)).resolve(), wanted_architectures(), library)

    return {"build_ext": BuildLibrary}


def options(extensions: list) -> dict:
    """`options` for setup.py: a wheel with the library serves every Python from 3.10 on."""
    return {"bdist_wheel": {"py_limited_api": "cp310"}} if extensions else {}
