"""Builds the CUDA C++ of `cuda/` into one library on torch's stable ABI: any Python, any torch from OLDEST_TORCH on.

When the package is installed where torch and nvcc are at hand (`pip install --no-build-isolation .`), for ARCHITECTURES or TORCH_CUDA_ARCH_LIST;
otherwise on first use, for the GPU that is there, into the user's cache. SMI_BUILD_CUDA=0 leaves it out of an installation.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .cache import cache_folder, replace_file

FOLDER = Path(__file__).parent / "cuda"
BUILT = Path(__file__).parent / "_C.abi3.so"
NAME = "smi.csrc._C"
ARCHITECTURES = "8.0+PTX;9.0a"  # PTX: later GPUs compile it when they load it
OLDEST_TORCH = (2, 11)
OLDEST_NVCC = (12, 0)
SHIPPED = ["README.md", "cuda/*", "cpu/*", "autograd/*", "emulate/*"]  # package data: what a build on first use needs
FLAGS = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]


def why_not() -> str | None:
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


def compile_library(target: Path, architectures: str) -> None:
    """Compile every source, as many at once as there are processors, and link them into `target`. Raises RuntimeError with the compiler's words."""
    flags = [*FLAGS, "-I", str(FOLDER), "-I", str(torch_folder() / "include"), *architecture_flags(architectures)]
    sources = sorted([*FOLDER.glob("*.cu"), *FOLDER.glob("*.cpp")])
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        objects = [Path(folder) / f"{source.name}.o" for source in sources]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            commands = [[nvcc(), *flags, "-c", str(source), "-o", str(made)] for source, made in zip(sources, objects, strict=True)]
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


def cached_library(architecture: str) -> Path:
    """Where a build on first use for one architecture is kept; its name changes with the sources, the compiler and torch's version."""
    import torch

    words = hashlib.sha256(f"{architecture} {FLAGS} {torch.__version__}".encode())
    for source in sorted(FOLDER.iterdir()):
        words.update(source.read_bytes())
    return cache_folder("csrc", words.hexdigest()[:16]) / "smi_cuda.so"


def extensions() -> list:
    """`ext_modules` for setup.py: the library, or nothing where it cannot be built, with the reason on standard error."""
    reason = "SMI_BUILD_CUDA=0" if os.environ.get("SMI_BUILD_CUDA") == "0" else why_not()
    if reason:
        print(f"smi: the CUDA library is left out: {reason}", file=sys.stderr)
        return []
    from setuptools import Extension

    return [Extension(NAME, sources=[], py_limited_api=True)]


def commands() -> dict:
    """`cmdclass` for setup.py."""
    from setuptools.command.build_ext import build_ext

    class BuildLibrary(build_ext):
        def build_extension(self, extension) -> None:
            compile_library(Path(self.get_ext_fullpath(extension.name)).resolve(), os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES)

    return {"build_ext": BuildLibrary}


def options(extensions: list) -> dict:
    """`options` for setup.py: a wheel with the library serves every Python from 3.10 on."""
    return {"bdist_wheel": {"py_limited_api": "cp310"}} if extensions else {}
