"""The one runner of benchmark cases: correct first, then alternating rounds of all sides, warm and cold, against measured ceilings."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch

from smi.kernels import comparison, dispatch, timing

from ..cases.operations import Case

ROUNDS = 20


class Ceilings(NamedTuple):
    """What this device does at best in plain code: bytes per second of a large copy, operations per second of a large product."""

    bytes: float
    operations: float


class Measurement(NamedTuple):
    """One side of one case. Times are 20, 50 and 80 % quantiles in seconds of forward and backward; share is of the floor that the ceilings give."""

    side: str
    warm: timing.Quantiles
    cold: timing.Quantiles | None
    peak_bytes: int
    gigabytes_per_second: float
    teraflops: float
    share: float


def ceilings(device: torch.device, elements: int = 1 << 30, size: int = 8192, dtype: torch.dtype = torch.bfloat16) -> Ceilings:
    """Measured by copying `elements` and multiplying two matrices of side `size`."""
    source = torch.ones(elements, dtype=dtype, device=device)
    target = torch.empty_like(source)
    a, b = torch.randn(2, size, size, dtype=dtype, device=device).unbind()
    out = torch.empty_like(a)
    runs = {"copy": lambda: target.copy_(source), "product": lambda: torch.mm(a, b, out=out)}
    for run in runs.values():
        run()
    median = {name: timing.quantiles(samples).median for name, samples in timing.alternate(runs, device).items()}
    return Ceilings(2 * elements * dtype.itemsize / median["copy"], 2 * size**3 / median["product"])


def cache_flusher(device: torch.device) -> Callable[[], object] | None:
    """Overwrites twice the L2 cache; None on the CPU."""
    if device.type != "cuda":
        return None
    buffer = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)
    return buffer.zero_


def versions(operation: str, device: torch.device) -> list[str]:
    """The versions of an operation that are timed on a device, stock first."""
    fast = dispatch.NEEDS_VERDICT if device.type == "cuda" else ("cpu",)
    return [v for v in ("stock", *fast) if dispatch.exists(operation, v)]


def steps(case: Case, example: comparison.Example, device: torch.device, compiled: bool) -> dict[str, Callable[[], None]]:
    """Every side of a case by name, forward and backward: our versions, the alternatives and, if asked for, `compiled`."""
    with dispatch.forced("stock"):
        results = comparison.as_tuple(example.function(**cloned(example)))
    weights = tuple(torch.randn_like(result) for result in results)

    def step(function: Callable, arguments: dict, version: str | None = None) -> Callable[[], None]:
        def run() -> None:
            with dispatch.forced(version) if version else nullcontext(), torch.autograd.set_multithreading_enabled(False):
                comparison.outcome(function, arguments, example.inputs, weights)

        return run

    sides = {name: step(example.function, cloned(example), name) for name in versions(case.operation, device)}
    plain = case.plain(cloned(example))
    sides |= {name: step(function, plain) for name, function in case.others.items()}
    if compiled:
        sides["compiled"] = step(torch.compile(case.others["eager"]), case.plain(cloned(example)))
    return sides


def cloned(example: comparison.Example) -> dict:
    """The example's arguments, those written in place as copies."""
    return example.arguments | {name: example.arguments[name].clone() for name in example.mutated}


def check(case: Case, example: comparison.Example, version: str) -> str | None:
    """What is wrong with a version on this case; None if nothing is."""
    try:
        errors, _ = comparison.compare(version, example, case.dtype)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # reported for this side; the others are still measured
        return f"{type(error).__name__}: {error}"[:300]
    failed = [f"{e.name} {e.error:.1e}, {e.allowed:.1e} allowed" for e in errors if not e.passes]
    return "; ".join(failed) or None


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that one call needs beyond what is allocated before; 0 on the CPU."""
    if device.type != "cuda":
        run()
        return 0
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def measure(
    case: Case, device: torch.device, ceiling: Ceilings, rounds: int = ROUNDS, compiled: bool = False
) -> tuple[list[Measurement], dict[str, str]]:
    """All sides of a case: measurements of those that run and are correct, and by name why the others were not timed."""
    torch.manual_seed(0)
    example = case.build(device, case.dtype)
    refused = {version: wrong for version in versions(case.operation, device) if (wrong := check(case, example, version))}
    ready, peaks = {}, {}
    for name, step in steps(case, example, device, compiled).items():
        if name in refused:
            continue
        try:
            step()  # compiles and allocates what stays
            peaks[name] = peak_memory(step, device)
            ready[name] = timing.captured(step, device)
        except Exception as error:  # a backend of SDPA that does not take these shapes, for example
            refused[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    flush = cache_flusher(device)
    warm = timing.alternate(ready, device, rounds)
    cold = timing.alternate(ready, device, rounds, before=flush) if flush else {}
    return [summary(case, name, warm[name], cold.get(name), peaks[name], ceiling) for name in ready], refused


def floor(case: Case, ceiling: Ceilings) -> float:
    """Seconds that the case takes at least: its bytes or its operations at the measured ceilings, whichever takes longer."""
    return max(case.bytes / ceiling.bytes, case.operations / ceiling.operations)


def summary(case: Case, side: str, warm: list[float], cold: list[float] | None, peak: int, ceiling: Ceilings) -> Measurement:
    """Quantiles and rates; rates and share are those of the cold median where there is one, since in a model the operands come from elsewhere."""
    quantiles, chilled = timing.quantiles(warm), timing.quantiles(cold) if cold else None
    median = (chilled or quantiles).median
    return Measurement(side, quantiles, chilled, peak, case.bytes / median / 1e9, case.operations / median / 1e12, floor(case, ceiling) / median)


class Budget:
    """Seconds that are left of a run that must end."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()
