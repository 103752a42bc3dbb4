"""Builds C++ for the CPU on first use, into the user's cache, and loads it.

`cpu/` is all arithmetic, for this very processor. It sees no header of torch: threads are taken from torch by a function pointer of its stable C
interface, tensors are passed as addresses. `autograd/` is operations of PyTorch whose gradient is C++ too, for this very torch, and calls `cpu/`.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

from .build import run, torch_folder
from .cache import cache_folder, replace_file

FOLDER = Path(__file__).parent / "cpu"
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-fvisibility=default"]
AUTOGRAD_FOLDER = FOLDER.parent / "autograd"
AUTOGRAD_FLAGS = ["-std=c++20", "-O1", "-fPIC", "-shared"]  # most of its time is spent on the headers


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
    return _load("the C++ kernels for the CPU", _build_library)


def _build_library(compiler: str) -> ctypes.CDLL:
    flags, what = [*FLAGS, _architecture()], "the CPU kernels for this processor, once (about 10 seconds)"
    loaded = _built(compiler, "smi_cpu.so", flags, sorted(FOLDER.glob("*.*")), _meaning(compiler, _architecture()), what)
    loaded.smi_use_threads(_torch().torch_parallel_for)
    return loaded


@cache
def operation(name: str) -> Callable | None:
    """An operation of `autograd/`; None where it cannot be built, which is also printed once."""
    try:
        _autograd()
    except BuildFailed as error:
        print(f"smi: {error}; Python's autograd runs instead", file=sys.stderr)
        return None
    import torch

    return getattr(torch.ops.smi, name).default


@cache
def _autograd() -> ctypes.CDLL:
    return _load("the CPU operations with a gradient in C++", _build_autograd)


def _build_autograd(compiler: str) -> ctypes.CDLL:
    import torch

    include, flags = torch_folder() / "include", [*AUTOGRAD_FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={torch.compiled_with_cxx11_abi():d}"]
    flags += ["-I", str(include), "-I", str(include / "torch/csrc/api/include"), "-L", str(torch_folder() / "lib"), "-ltorch_cpu", "-lc10"]
    sources = [*sorted(AUTOGRAD_FOLDER.glob("*.*")), *sorted(FOLDER.glob("*.h"))]
    words = _meaning(compiler) + torch.__version__.encode()
    loaded = _built(compiler, "smi_autograd.so", flags, sources, words, "CPU operations for this torch, once (about 25 seconds)")
    functions = [getattr(library(), f"smi_attention_{f}_{dtype}") for f in ("forward", "backward") for dtype in ("float32", "bfloat16", "float16")]
    loaded.smi_use_attention((ctypes.c_void_p * len(functions))(*(ctypes.cast(f, ctypes.c_void_p) for f in functions)))
    return loaded


def _load(what: str, build: Callable[[str], ctypes.CDLL]) -> ctypes.CDLL:
    found = compiler()
    if found is None:
        raise BuildFailed(f"{what} need g++ or clang++, and neither is on the PATH")
    try:
        return build(found)
    except (OSError, RuntimeError, AttributeError) as error:
        raise BuildFailed(f"{what} cannot be built here: {str(error)[-500:]}") from error


def _meaning(compiler: str, *flags: str) -> bytes:
    """What the compiler is and, with the flag for it, what `native` means: all that it defines."""
    return subprocess.run([compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True).stdout


def _torch() -> ctypes.CDLL:
    import torch  # noqa: F401  loads the library that is asked for

    name = {"Darwin": "libtorch_cpu.dylib"}.get(platform.system(), "libtorch_cpu.so")
    return ctypes.CDLL(str(torch_folder() / "lib" / name))


def _architecture() -> str:
    return "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"


def _built(compiler: str, name: str, flags: list[str], sources: list[Path], words: bytes, what: str) -> ctypes.CDLL:
    """The library that `sources` give, compiled if the cache does not hold it: its folder is named by sources, flags and `words`."""
    state = hashlib.sha256(words + repr(flags).encode())
    for source in sources:
        state.update(source.read_bytes())
    target = cache_folder("csrc", state.hexdigest()[:16]) / name
    if not target.exists():
        print(f"smi: compiling {what}", file=sys.stderr)
        target.parent.mkdir(parents=True, exist_ok=True)
        units = [str(source) for source in sources if source.suffix == ".cpp"]
        replace_file(target, lambda made: run([compiler, *units, *flags, "-o", str(made)]))
    return ctypes.CDLL(str(target))
