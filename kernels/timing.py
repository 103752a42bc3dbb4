"""Times of two or more functions, on a GPU or a CPU, measured in alternation: a drift of the machine's clock meets all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from . import graphs


class Quantiles(NamedTuple):
    """20, 50 and 80 % quantiles, in seconds."""

    low: float
    median: float
    high: float


def quantiles(samples: list[float]) -> Quantiles:
    """20, 50 and 80 % quantiles of one or more samples, linear between neighbours."""
    if len(samples) == 1:
        return Quantiles(*samples * 3)
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return Quantiles(cuts[1], cuts[4], cuts[7])


def captured(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """`run` as one CUDA graph, so that what is timed is the GPU's work and not Python's; `run` itself on the CPU. Calls it three times to warm up."""
    if device.type != "cuda":
        for _ in range(3):
            run()
        return run
    return graphs.capture(run, device, warm_up=3).replay


def elapsed(run: Callable[[], object], device: torch.device, repeats: int = 1, before: Callable[[], object] | None = None) -> float:
    """Seconds per call over `repeats` calls in a row; `before` runs first and is not timed."""
    if device.type != "cuda":
        if before:
            before()
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - start) / repeats
    with torch.cuda.device(device):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if before:
            before()
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / 1000 / repeats


def alternate(
    runs: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int = 10,
    sample_seconds: float = 1e-3,
    before: Callable[[], object] | None = None,
    calls: Mapping[str, int] | None = None,
) -> dict[str, list[float]]:
    """Samples in seconds per call by name. Every round times every run once, in alternating order. A sample lasts about `sample_seconds`, or one
    call where `before` (which empties the caches) is given. calls: of a sample by name, where they are known."""

    def enough(run: Callable[[], object]) -> int:
        return 1 if before else max(1, min(1000, round(sample_seconds / max(elapsed(run, device), 1e-7))))

    repeats = calls or {name: enough(run) for name, run in runs.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds):
        for name in list(runs)[:: -1 if i % 2 else 1]:
            samples[name].append(elapsed(runs[name], device, repeats[name], before))
    return samples
