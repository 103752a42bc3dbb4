"""Time of a call, and of one GEMM in each dtype, on the CPU."""

import time
from collections.abc import Callable
from functools import cache

import torch

PROBE = 256  # rows of the square matrices whose GEMM is timed


def seconds_of(run: Callable[[], object], calls: int = 2) -> float:
    """The smallest of a few calls on the CPU, after one that compiles and warms up."""
    run()
    times = []
    for _ in range(calls):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


@cache
def gemm_seconds(device: torch.device) -> dict[torch.dtype, float]:
    """Seconds of one GEMM of two square matrices of PROBE rows on the CPU in float32 and bfloat16, measured once."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2, PROBE, PROBE).to(device, dtype).unbind()
        seconds[dtype] = seconds_of(lambda a=a, b=b: a @ b, 3)
    return seconds
