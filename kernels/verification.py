"""How a GPU version earns its place: correct and faster, shown on that very kind of GPU.

Committed result files say so for the architectures that were measured (`verified.json`, made by `python -m bench.tables.verified`). On any other
GPU the first use of an operation runs a self-check of seconds, announced on standard error, and keeps its verdict in the user's cache directory,
under a key of device, versions and the operation's own source. `verify` checks everything anew.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from typing import NamedTuple

import torch

from smi.csrc import build
from smi.csrc.cache import cache_folder, replace_file

from . import comparison, timing, versions
from .precision import same_precision

VERIFIED = Path(__file__).parent / "verified.json"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Verdict(NamedTuple):
    """What is known about a version of an operation on a GPU in one dtype and class of sizes."""

    operation: str
    version: str
    dtype: str  # bfloat16, ...
    size: str
    correct: bool
    speedup: float  # median time of the best stock composition over its own; 0 where it was not timed
    note: str  # largest error and what the rule allows, or what went wrong

    @property
    def chosen(self) -> bool:
        return self.correct and self.speedup > 1


_known: dict[tuple, Verdict] = {}  # what this process has read or found out


def faster_than_stock(operation: str, candidates: list[str], device: torch.device, dtype: torch.dtype, size: str) -> list[str]:
    """Those of `candidates` that are correct on `device` and faster than stock PyTorch, the fastest first."""
    verdicts = [verdict(operation, version, device, short(dtype), size) for version in candidates]
    return [v.version for v in sorted(verdicts, key=lambda v: v.speedup, reverse=True) if v.chosen]


def verdict(operation: str, version: str, device: torch.device, dtype: str, size: str) -> Verdict:
    """The committed verdict for this architecture, else the cached one for this device, else that of a self-check made now."""
    key = (operation, version, device, dtype, size)
    if key not in _known:
        _known[key] = (
            find(committed(architecture(device)), operation, version, dtype, size)
            or find(cached(operation, device), operation, version, dtype, size)
            or announced_check(operation, version, device, dtype, size)
        )
    return _known[key]


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def architecture(device: torch.device) -> str:
    """For example sm_90."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def find(verdicts: list[Verdict], operation: str, version: str, dtype: str, size: str) -> Verdict | None:
    return next((v for v in verdicts if v[:4] == (operation, version, dtype, size)), None)


@cache
def committed(arch: str) -> list[Verdict]:
    """The verdicts shipped for an architecture."""
    return [Verdict(**row) for row in json.loads(VERIFIED.read_text())["architectures"].get(arch, [])]


def installed(package: str) -> str:
    try:
        return version_of(package)
    except PackageNotFoundError:
        return "not installed"


def sources(operation: str) -> list[Path]:
    """All files on which a verdict depends: the operation's, what operations share, timed tiles, and csrc with its CUDA sources."""
    kernels, csrc = Path(__file__).parent, Path(build.__file__).parent
    shared = [*kernels.glob("*.py"), *kernels.glob("tiles/*.json"), *csrc.glob("*.py"), *build.FOLDER.iterdir()]
    return sorted([*shared, *(kernels / operation).glob("*.py")])


def identity(operation: str, device: torch.device) -> dict[str, str]:
    """All on which a verdict depends: another value of any asks for a new check."""
    digest = hashlib.sha256()
    for path in sources(operation):
        digest.update(path.read_bytes())
    return {
        "operation": operation,
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "smi": installed("sparse-model-inversion"),
        "source": digest.hexdigest()[:16],
    }


def cache_file(key: dict[str, str]) -> Path:
    return cache_folder("verdicts") / f"{key['operation']}-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}.json"


def cached(operation: str, device: torch.device) -> list[Verdict]:
    """The verdicts kept for this operation on this device; none where there is no file or it cannot be read."""
    key = identity(operation, device)
    try:
        content = json.loads(cache_file(key).read_text())
        return [Verdict(**row) for row in content["verdicts"]] if content["identity"] == key else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def keep(found: Verdict, device: torch.device) -> None:
    """Add a verdict to the user's cache, replacing its predecessor; a cache that cannot be written is reported, not fatal."""
    key = identity(found.operation, device)
    path = cache_file(key)
    verdicts = [v for v in cached(found.operation, device) if v[:4] != found[:4]] + [found]
    text = json.dumps({"identity": key, "verdicts": [v._asdict() for v in verdicts]}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda temporary: temporary.write_text(text))
    except OSError as error:
        say(f"the verdict on {found.operation} could not be kept in {path.parent}: {error}")


def say(text: str) -> None:
    print(f"smi: {text}", file=sys.stderr, flush=True)


def announced_check(operation: str, version: str, device: torch.device, dtype: str, size: str) -> Verdict:
    """Self-check with a line before and after; its verdict is kept, unless memory ran out. Raises BackendUnavailable during graph capture."""
    if torch.cuda.is_current_stream_capturing():
        raise versions.BackendUnavailable(
            f"{operation} in {dtype} is not verified on this GPU and cannot be while a CUDA graph is captured: run it once before, or smi verify"
        )
    where = f"{operation} ({version}, {dtype}, {size} sizes) on {torch.cuda.get_device_name(device)}"
    say(f"first use of {where}: checking it, a few seconds")
    try:
        found = self_check(operation, version, device, dtype, size)
        keep(found, device)
    except torch.OutOfMemoryError:
        found = Verdict(operation, version, dtype, size, False, 0.0, "not enough free memory to check it")
    result = f"{found.speedup:.2f} times the speed of stock PyTorch" if found.correct else found.note
    say(f"{where}: {'correct' if found.correct else 'not correct'}, {result}; {'used' if found.chosen else 'not used'}")
    return found


def self_check(operation: str, version: str, device: torch.device, dtype: str, size: str) -> Verdict:
    """Compare `version` with the reference on the device, then time it against stock PyTorch; what fails makes the verdict, except lack of memory.

    In a thread of its own: the first use may come under no_grad or from inside a custom op, where autograd is switched off for its thread.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_self_check, operation, version, device, dtype, size).result()


def _self_check(operation: str, version: str, device: torch.device, dtype: str, size: str) -> Verdict:
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of this thread
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            example = import_module(f"smi.kernels.{operation}.op").example(device, getattr(torch, dtype), size)
            errors, _ = comparison.compare(version, example, getattr(torch, dtype))
            worst = max(errors, key=lambda e: e.error / e.allowed if e.allowed else float(e.error > 0))
            note = f"largest error {worst.error:.1e} in {worst.name}, {worst.allowed:.1e} allowed"
            if not all(e.passes for e in errors):
                return Verdict(operation, version, dtype, size, False, 0.0, note)
            return Verdict(operation, version, dtype, size, True, speedup(operation, version, example, device), note)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler that fails is a verdict too: the operation has other versions
        return Verdict(operation, version, dtype, size, False, 0.0, f"{type(error).__name__}: {error}"[:300])


def speedup(operation: str, version: str, example: comparison.Example, device: torch.device) -> float:
    """Median time of stock PyTorch over that of `version`: forward and backward, in CUDA graphs."""
    with versions.forced("stock"):
        weights = tuple(torch.randn_like(result) for result in comparison.as_tuple(example.function(**example.arguments)))

    def step() -> None:
        comparison.outcome(example.function, example.arguments, example.inputs, weights)

    samples = timing.alternate({name: timing.captured(in_version(name, operation, step), device) for name in ("stock", version)}, device)
    return timing.quantiles(samples["stock"]).median / timing.quantiles(samples[version]).median


def in_version(version: str, operation: str, step: Callable[[], object]) -> Callable[[], None]:
    """`step` with every operation forced into `version`, in this thread. Where there is no stock composition, stock is the definition in plain
    PyTorch's own precision."""
    plain = version == "stock" and not versions.exists(operation, "stock")

    def run() -> None:
        with versions.forced(version), torch.autograd.set_multithreading_enabled(False), same_precision() if plain else nullcontext():
            step()

    return run


def verify(device: torch.device) -> list[Verdict]:
    """Check every GPU version of every operation on `device` in every dtype and class of sizes, keep the verdicts and return them."""
    found = []
    for operation in versions.OPERATIONS:
        sizes = getattr(import_module(f"smi.kernels.{operation}.op"), "SIZES", ("any",))
        for version in (v for v in versions.NEEDS_VERDICT if versions.exists(operation, v)):
            for dtype in map(short, DTYPES):
                for size in sizes:
                    found.append(self_check(operation, version, device, dtype, size))
                    keep(found[-1], device)
                    _known[operation, version, device, dtype, size] = found[-1]
    return found
