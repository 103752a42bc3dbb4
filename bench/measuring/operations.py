"""Measures cases of operations: correct first, then alternating rounds of all sides, warm and cold, held against the roofline."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch

from smi.engine.dtype import choose_dtype
from smi.kernels import comparison, timing, versions
from smi.kernels.verification import short

from ..cases.operations import Case
from .ceilings import Ceilings
from .memory import peak_memory

ROUNDS, CPU_ROUNDS = 20, 10
REPLAYS = 10  # of a graph between two events


class Measurement(NamedTuple):
    """One side of one case, forward and backward: 20, 50 and 80 % quantiles in seconds. share: roofline time over the median time."""

    side: str
    warm: timing.Quantiles
    cold: timing.Quantiles | None
    peak_bytes: int
    gigabytes_per_second: float
    teraflops: float
    share: float


def cache_flusher(device: torch.device) -> Callable[[], object] | None:
    """Overwrites twice the L2 cache; None on the CPU."""
    if device.type != "cuda":
        return None
    buffer = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)
    return buffer.zero_


def timed_versions(operation: str, device: torch.device) -> list[str]:
    """The versions of an operation that are timed on a device, stock first."""
    fast = versions.NEEDS_VERDICT if device.type == "cuda" else ("cpu",)
    return [v for v in ("stock", *fast) if versions.exists(operation, v)]


def steps(case: Case, example: comparison.Example, device: torch.device, compiled: bool) -> dict[str, Callable[[], None]]:
    """Every side of a case by name, forward and backward: our versions, the alternatives and, if asked for, `compiled`."""
    with versions.forced("stock"):
        results = comparison.as_tuple(example.function(**cloned(example)))
    weights = tuple(torch.randn_like(result) for result in results)

    def step(function: Callable, arguments: dict, version: str | None = None) -> Callable[[], None]:
        def run() -> None:
            with versions.forced(version) if version else nullcontext(), torch.autograd.set_multithreading_enabled(False):
                comparison.outcome(function, arguments, example.inputs, weights)

        return run

    sides = {name: step(example.function, cloned(example), name) for name in timed_versions(case.operation, device)}
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


def measure(
    case: Case, device: torch.device, ceilings: Ceilings, rounds: int = ROUNDS, compiled: bool = False
) -> tuple[list[Measurement], dict[str, str]]:
    """All sides of a case: measurements of those that run and are correct, and by name why the others were not timed."""
    torch.manual_seed(0)
    example = case.build(device, case.dtype)
    refused = {version: wrong for version in timed_versions(case.operation, device) if (wrong := check(case, example, version))}
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
    calls = dict.fromkeys(ready, REPLAYS) if device.type == "cuda" else None
    warm = timing.alternate(ready, device, rounds, calls=calls)
    cold = timing.alternate(ready, device, rounds, before=flush) if flush else {}
    return [summary(case, name, warm[name], cold.get(name), peaks[name], ceilings) for name in ready], refused


def roofline_seconds(case: Case, ceilings: Ceilings) -> float:
    """What the case takes at least: its bytes or its FLOPs at the measured ceilings, whichever takes longer."""
    return max(case.bytes / ceilings.bytes, case.flops / ceilings.flops)


def summary(case: Case, side: str, warm: list[float], cold: list[float] | None, peak: int, ceilings: Ceilings) -> Measurement:
    """Quantiles and rates; rates and share are those of the cold median where there is one, since in a model the operands come from elsewhere."""
    quantiles, chilled = timing.quantiles(warm), timing.quantiles(cold) if cold else None
    median = (chilled or quantiles).median
    share = roofline_seconds(case, ceilings) / median
    return Measurement(side, quantiles, chilled, peak, case.bytes / median / 1e9, case.flops / median / 1e12, share)


def measure_on_cpu(case: Case, ceilings: dict[str, Ceilings]) -> list[dict]:
    """Rows of a case on the CPU; where bfloat16 is asked for, in the dtype that is fast there. ceilings: by dtype."""
    device = torch.device("cpu")
    if case.dtype == torch.bfloat16:
        case = case.in_dtype(choose_dtype(device))
    measured, refused = measure(case, device, ceilings[short(case.dtype)], CPU_ROUNDS)
    able = [version for version in timed_versions(case.operation, device) if version not in refused]
    return case_rows(case, measured, refused, able[-1] if able else "none")


def case_rows(case: Case, measured: list[Measurement], refused: dict[str, str], resolved: str) -> list[dict]:
    """Result rows of one case. resolved: the version that `auto` takes."""
    about = {"kind": "case", "operation": case.operation, "case": case.shape, "dtype": short(case.dtype), "resolved": resolved}
    timed = [
        about
        | {
            "side": m.side,
            "warm_us": [q * 1e6 for q in m.warm],
            "cold_us": [q * 1e6 for q in m.cold] if m.cold else None,
            "gigabytes_per_second": m.gigabytes_per_second,
            "teraflops": m.teraflops,
            "share_of_floor": m.share,
            "peak_bytes": m.peak_bytes,
        }
        for m in measured
    ]
    return timed + [about | {"side": side, "not_timed": reason} for side, reason in refused.items()]
