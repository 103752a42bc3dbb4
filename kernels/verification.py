"""How a GPU version earns its place: correct and faster, shown on that very kind of GPU, for exactly what is called.

Committed result files say so for the architectures that were measured (`verified.json`, made by `python -m bench.tables.verified`). On any other
GPU, and with other compilers or sources, the first use of a raw function in a dtype and class of sizes runs a check, announced on standard error, in
a process of its own (`check_process`), and keeps its verdict in the user's cache directory (`verdicts`). `verify` checks everything anew.
"""

import atexit
from collections.abc import Collection, Iterator

import torch

from . import versions
from .check_process import Checker
from .verdicts import Key, Verdict, architecture, cached, committed, find, installed, keep, say, verdict_of

__all__ = ["DTYPES", "architecture", "checked", "faster_than_stock", "installed", "keep", "keys", "short", "verdict", "verify"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # that are verified, the engine's first

_known: dict[tuple[Key, torch.device], Verdict] = {}  # what this process has read or found out
_checker = Checker()  # of first uses: it runs while they follow each other
atexit.register(_checker.end)


def faster_than_stock(operation: str, function: str, candidates: list[str], device: torch.device, dtype: torch.dtype, size: str) -> list[str]:
    """Those of `candidates` in which raw `function` is correct on `device` and faster than stock PyTorch, the fastest first."""
    verdicts = [verdict(Key(operation, function, version, short(dtype), size), device) for version in candidates]
    return [v.version for v in sorted(verdicts, key=lambda v: v.speedup, reverse=True) if v.chosen]


def verdict(key: Key, device: torch.device) -> Verdict:
    """The committed verdict for this architecture, else the cached one for this device, else that of a check made now."""
    if (key, device) not in _known:
        known = find(committed(key.operation, device), key) or find(cached(key.operation, device), key)
        _known[key, device] = known or announced_check(key, device)
    return _known[key, device]


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def announced_check(key: Key, device: torch.device) -> Verdict:
    """A check with a line before and after; its verdict is kept. Raises BackendUnavailable during graph capture."""
    if torch.cuda.is_current_stream_capturing():
        raise versions.BackendUnavailable(
            f"{key} is not verified on this GPU and cannot be while a CUDA graph is captured: call it once before, or run smi verify"
        )
    say(f"first use of {key} on {torch.cuda.get_device_name(device)}: checking it, a few seconds")
    found = checked(key, device, _checker)
    say(f"{key}: {found.outcome}, {found.reason}; {'used' if found.chosen else 'not used'}")
    return found


def checked(key: Key, device: torch.device, checker: Checker) -> Verdict:
    """The verdict of a check made now, kept. What a version calls is compiled here, before: that may take longer than a check."""
    reason = versions.ensure_built(key.operation, key.version)
    try:
        found = verdict_of(key, "unsupported", reason) if reason else checker.check(key, device)
    except OSError as error:
        found = verdict_of(key, "crashed", f"no process can be started to check it: {error}")
    keep(found, device)
    return found


def keys(operations: Collection[str]) -> list[Key]:
    """All that can be verified of some operations: what the engine calls for the usual models and runs first, then other sizes and dtypes."""
    found = []
    for operation in operations:
        sizes = versions.sizes_of(operation)
        for function, classes in sizes.SIZES.items():
            for version in (v for v in versions.NEEDS_VERDICT if exists(operation, v, function)):
                for i, dtype in enumerate(getattr(sizes, "DTYPES", DTYPES)):
                    found += [(max(i, place), Key(operation, function, version, short(dtype), size)) for place, size in enumerate(classes)]
    return [key for _, key in sorted(found, key=lambda pair: pair[0])]


def exists(operation: str, version: str, function: str) -> bool:
    """Whether raw `function` has this version of its own: not where a version takes stock's, or cannot be loaded."""
    try:
        return versions.exists(operation, version) and not versions.same_as_stock(operation, version, function)
    except versions.BackendUnavailable:
        return False


def verify(device: torch.device, operations: Collection[str] = versions.OPERATIONS) -> Iterator[Verdict]:
    """Check every raw function of every GPU version on `device` in every dtype and class of sizes, keep the verdicts and give each at once."""
    with Checker() as checker:
        for key in keys(operations):
            found = checked(key, device, checker)
            _known[key, device] = found
            yield found
