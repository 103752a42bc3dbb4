"""One check of a GPU version: the error rule on the arguments that stand for a class of sizes, then its time beside stock PyTorch's.

Runs in a process made for it (`check_process`): what a kernel does to the device or to the process ends there.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch

from . import comparison, timing, versions
from .verdicts import Key, Verdict, verdict_of


def self_check(key: Key, device: torch.device) -> Verdict:
    """Compare with the definition on the device, then time against stock PyTorch. What fails makes the verdict."""
    dtype = getattr(torch, key.dtype)
    try:
        torch.manual_seed(0)
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return _checked(key, dtype, device)
    except Exception as error:  # a compiler that fails is a verdict too: the operation has other versions
        return verdict_of(key, "crashed" if lies_in_the_machine(error, device) else "failed", f"{type(error).__name__}: {error}"[:300])


def lies_in_the_machine(error: Exception, device: torch.device) -> bool:
    """Whether an error says nothing about a version: memory ran out, or CUDA reports what may come from another kernel or process."""
    if isinstance(error, torch.OutOfMemoryError) or "CUDA" in f"{type(error).__name__} {error}":
        return True
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # raises what a kernel did that was launched before
    except Exception:
        return True
    return False


def _checked(key: Key, dtype: torch.dtype, device: torch.device) -> Verdict:
    sizes = versions.sizes_of(key.operation)
    written, comparable = getattr(sizes, "WRITTEN", {}).get(key.function, ()), getattr(sizes, "comparable", None)
    usual, errors = None, []
    for args in sizes.arguments(key.function, key.size, dtype, device):
        reason = versions.why_not(key.operation, key.version, key.function, args) or versions.ensure_built(key.operation, key.version)
        if reason and usual is None:  # the usual ones come first; of the others a class may have some that a version leaves to the next
            return verdict_of(key, "unsupported", reason)
        usual = args if usual is None else usual
        if not reason:
            errors += comparison.compare_function(*key[:3], args, dtype, written, comparable)
    worst = max(errors, key=lambda e: e.error / e.allowed if e.allowed else float(e.error > 0))
    note = f"largest error {worst.error:.1e} in {worst.name}, {worst.allowed:.1e} allowed"
    if not all(e.passes for e in errors):
        return verdict_of(key, "incorrect", note)
    assert usual is not None
    return verdict_of(key, "correct", note, speedup(key, usual, device))


def speedup(key: Key, args: tuple, device: torch.device) -> float:
    """Median time of stock PyTorch over that of the version, each in a CUDA graph."""

    def captured(version: str) -> Callable[[], object]:
        function = getattr(versions.load(key.operation, version), key.function)
        return timing.captured(lambda: function(*args), device)

    samples = timing.alternate({version: captured(version) for version in ("stock", key.version)}, device)
    return timing.quantiles(samples["stock"]).median / timing.quantiles(samples[key.version]).median
