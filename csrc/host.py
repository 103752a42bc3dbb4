"""Builds the C++ of `cpu/` for this very processor, on first use, into the user's cache, and loads it. It sees no header of torch: threads are taken
from torch by a function pointer of its stable C interface, tensors are passed as addresses."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from .build import run, torch_folder

FOLDER = Path(__file__).parent / "cpu"
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-fvisibility=default"]


class BuildFailed(ImportError):
    """The library cannot be built or loaded here; the message says why."""


def compiler() -> str | None:
    """The C++ compiler: of CXX, g++ or clang++."""
    return next((path for name in (os.environ.get("CXX"), "g++", "clang++") if name and (path := shutil.which(name))), None)


@cache
def why_not() -> str | None:
    """Why there is no library here, in one sentence, which is also printed once; None if there is, built now if it must be."""
    try:
        library()
    except BuildFailed as error:
        print(f"smi: {error}; PyTorch's own operations run instead", file=sys.stderr)
        return str(error)
    return None


@cache
def library() -> ctypes.CDLL:
    """The compiled functions. Raises BuildFailed where they cannot be had."""
    found = compiler()
    if found is None:
        raise BuildFailed("the C++ kernels for the CPU need g++ or clang++, and neither is on the PATH")
    try:
        target = _cached(found)
        if not target.exists():
            _compile(found, target)
        loaded = ctypes.CDLL(str(target))
        loaded.smi_use_threads(_torch().torch_parallel_for)
    except (OSError, RuntimeError, AttributeError) as error:
        raise BuildFailed(f"the C++ kernels for the CPU cannot be built here: {str(error)[-500:]}") from error
    return loaded


def _torch() -> ctypes.CDLL:
    import torch  # noqa: F401  loads the library that is asked for

    name = {"Darwin": "libtorch_cpu.dylib"}.get(platform.system(), "libtorch_cpu.so")
    return ctypes.CDLL(str(torch_folder() / "lib" / name))


def _architecture() -> str:
    return "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"


def _cached(found: str) -> Path:
    """Where the library is kept: its name changes with the sources, the compiler, and the processor that `native` means."""
    native = subprocess.run([found, _architecture(), "-dM", "-E", "-x", "c++", os.devnull], capture_output=True)
    words = hashlib.sha256(native.stdout + repr(FLAGS).encode())
    for source in sorted(FOLDER.glob("*.*")):
        words.update(source.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "smi" / "csrc" / words.hexdigest()[:16] / "smi_cpu.so"


def _compile(found: str, target: Path) -> None:
    print("smi: compiling the CPU kernels for this processor, once (about 10 seconds)", file=sys.stderr)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        run([found, *FLAGS, _architecture(), *map(str, sorted(FOLDER.glob("*.cpp"))), "-o", str(made)])
        os.replace(made, target)
