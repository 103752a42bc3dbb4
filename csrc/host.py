"""C++ for the CPU: compiled on first use, into the user's cache, and loaded.

`cpu/` is all arithmetic, for this very processor. It sees no header of torch: threads are taken from torch by a function pointer of its stable C
interface, tensors are passed as addresses. `autograd/` is operations of PyTorch whose gradient is C++ too, for this very torch, and calls `cpu/`.

Of a library, `why_not` and `is_built` are questions and compile nothing; `ensure_built` and `functions` compile what is missing.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from threading import RLock
from typing import NamedTuple

from .build import run, torch_folder
from .cache import cache_folder, is_sealed, replace_file, seal

FOLDER = Path(__file__).parent / "cpu"
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-fvisibility=default"]
AUTOGRAD_FOLDER = FOLDER.parent / "autograd"
AUTOGRAD_FLAGS = ["-std=c++20", "-O1", "-fPIC", "-shared"]  # most of its time is spent on the headers


def sanitizer_flags(sanitizers: str | None = None) -> list[str]:
    """For a build that checks itself: the sanitizers that are named or, where none is, those of SMI_SANITIZE, for example address,undefined."""
    sanitizers = os.environ.get("SMI_SANITIZE", "") if sanitizers is None else sanitizers
    return [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1", "-g"] if sanitizers else []


class BuildFailed(ImportError):
    """The library cannot be built or loaded here; the message says why."""


class Recipe(NamedTuple):
    """How a library is compiled. depends: what else decides the result, beside flags and sources."""

    flags: list[str]
    sources: list[Path]
    depends: bytes

    def path(self, file: str) -> Path:
        """Where the library lies once it is built: its folder is named by all that decides it."""
        state = hashlib.sha256(self.depends + repr(self.flags).encode())
        for source in self.sources:
            state.update(source.read_bytes())
        return cache_folder("csrc", state.hexdigest()[:16]) / file


@dataclass
class Library:
    """A library that is compiled on first use and loaded once a process. A build that fails is not tried again in this process."""

    name: str
    file: str
    announced: str  # when it is compiled
    instead: str  # what runs where it cannot be had
    recipe: Callable[[str], Recipe]  # for a compiler
    connect: Callable[[ctypes.CDLL], None]  # hands it the functions that it calls
    loaded: ctypes.CDLL | None = field(default=None, init=False)
    failure: str | None = field(default=None, init=False)
    building: RLock = field(default_factory=RLock, init=False)  # one thread compiles, the others wait for it

    def why_not(self) -> str | None:
        """Why it cannot be had here, in one sentence, as far as is known without compiling; None if nothing is known against it."""
        if self.loaded is None and self.failure is None and compiler() is None:
            return f"{self.name} need g++ or clang++, and neither is on the PATH"
        return self.failure

    def is_built(self) -> bool:
        """Whether it is compiled already, for this compiler, these sources and flags."""
        found = compiler()
        return self.loaded is not None or (found is not None and is_sealed(self.recipe(found).path(self.file)))

    def ensure_built(self) -> str | None:
        """Compile it where it is missing, and load it; why it cannot be had, in one sentence, which is also printed once, None if it can."""
        with self.building:
            if self.loaded is None and self.failure is None:
                try:
                    self.loaded = self._build()
                except BuildFailed as error:
                    self.failure = str(error)
                    print(f"smi: {error}; {self.instead}", file=sys.stderr)
        return self.failure

    def functions(self) -> ctypes.CDLL:
        """The compiled functions. Raises BuildFailed where they cannot be had."""
        if self.loaded is None and (reason := self.ensure_built()):
            raise BuildFailed(reason)
        return self.loaded

    def _build(self) -> ctypes.CDLL:
        reason, found = self.why_not(), compiler()
        if reason:
            raise BuildFailed(reason)
        try:
            loaded = ctypes.CDLL(str(self.compile(found)))
            self.connect(loaded)
            return loaded
        except (OSError, RuntimeError, AttributeError) as error:
            raise BuildFailed(f"{self.name} cannot be built here: {str(error)[-500:]}") from error

    def compile(self, found: str) -> Path:
        """Where it lies, compiled by that compiler where it is missing. Raises RuntimeError with the compiler's words."""
        recipe = self.recipe(found)
        path = recipe.path(self.file)
        if not is_sealed(path):
            print(f"smi: compiling {self.announced}", file=sys.stderr)
            _compile(found, recipe, path)
            seal(path)
        return path


def compiler() -> str | None:
    """The C++ compiler: of CXX, g++ or clang++."""
    return next((path for name in (os.environ.get("CXX"), "g++", "clang++") if name and (path := shutil.which(name))), None)


def _compile(compiler: str, recipe: Recipe, target: Path) -> None:
    """Raises RuntimeError with the compiler's words."""
    units = [str(source) for source in recipe.sources if source.suffix == ".cpp"]
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_file(target, lambda made: run([compiler, *units, *recipe.flags, "-o", str(made)]))


def _cpu_recipe(compiler: str) -> Recipe:
    native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    return Recipe([*FLAGS, native, *sanitizer_flags()], sorted(FOLDER.glob("*.*")), _macros(compiler, native))


def _autograd_recipe(compiler: str) -> Recipe:
    import torch

    include, flags = torch_folder() / "include", [*AUTOGRAD_FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={torch.compiled_with_cxx11_abi():d}"]
    flags += ["-I", str(include), "-I", str(include / "torch/csrc/api/include"), "-L", str(torch_folder() / "lib"), "-ltorch_cpu", "-lc10"]
    flags += sanitizer_flags()
    sources = [*sorted(AUTOGRAD_FOLDER.glob("*.*")), *sorted(FOLDER.glob("*.h"))]
    return Recipe(flags, sources, _macros(compiler) + torch.__version__.encode())


def _macros(compiler: str, *flags: str) -> bytes:
    """All that the compiler defines: what it is and, with the flag for it, what `native` means."""
    return subprocess.run([compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True).stdout


def _connect_threads(loaded: ctypes.CDLL) -> None:
    import torch  # noqa: F401  loads the library that is asked for

    name = {"Darwin": "libtorch_cpu.dylib"}.get(platform.system(), "libtorch_cpu.so")
    loaded.smi_use_threads(ctypes.CDLL(str(torch_folder() / "lib" / name)).torch_parallel_for)


def _connect_attention(loaded: ctypes.CDLL) -> None:
    functions = [getattr(library(), f"smi_attention_{f}_{dtype}") for f in ("forward", "backward") for dtype in ("float32", "bfloat16", "float16")]
    loaded.smi_use_attention((ctypes.c_void_p * len(functions))(*(ctypes.cast(f, ctypes.c_void_p) for f in functions)))


CPU = Library(
    name="the C++ kernels for the CPU",
    file="smi_cpu.so",
    announced="the CPU kernels for this processor, once (about 10 seconds)",
    instead="PyTorch's own operations run instead",
    recipe=_cpu_recipe,
    connect=_connect_threads,
)
AUTOGRAD = Library(
    name="the CPU operations with a gradient in C++",
    file="smi_autograd.so",
    announced="CPU operations for this torch, once (about 25 seconds)",
    instead="Python's autograd runs instead",
    recipe=_autograd_recipe,
    connect=_connect_attention,
)


def library() -> ctypes.CDLL:
    """The functions of `cpu/`. Raises BuildFailed where they cannot be had."""
    return CPU.functions()


@cache
def operation(name: str) -> Callable | None:
    """An operation of `autograd/`; None where it cannot be had."""
    if AUTOGRAD.ensure_built():
        return None
    import torch

    return getattr(torch.ops.smi, name).default
