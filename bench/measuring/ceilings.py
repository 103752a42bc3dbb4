"""What a device does at best in plain code: the ceilings of a roofline, measured."""

from typing import NamedTuple

import torch

from smi.engine.dtype import choose_dtype
from smi.kernels import timing

from ..sides.probe import PROBE, gemm_seconds

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CPU_SIZES = {"elements": 1 << 26, "side": 1536}


class Ceilings(NamedTuple):
    """Bytes per second of a large copy, FLOP/s of a large GEMM."""

    bytes: float
    flops: float


def measure_ceilings(device: torch.device, dtype: torch.dtype = torch.bfloat16, elements: int = 1 << 30, side: int = 8192) -> Ceilings:
    """By copying `elements` numbers and multiplying two square matrices of `side` rows."""
    source = torch.ones(elements, dtype=dtype, device=device)
    target = torch.empty_like(source)
    a, b = torch.randn(2, side, side, dtype=dtype, device=device).unbind()
    out = torch.empty_like(a)
    runs = {"copy": lambda: target.copy_(source), "GEMM": lambda: torch.mm(a, b, out=out)}
    for run in runs.values():
        run()
    median = {name: timing.quantiles(samples).median for name, samples in timing.alternate(runs, device).items()}
    return Ceilings(2 * elements * dtype.itemsize / median["copy"], 2 * side**3 / median["GEMM"])


def ceilings_by_dtype(device: torch.device) -> dict[str, Ceilings]:
    """Ceilings of a device in float32 and bfloat16, by the dtype's name."""
    if device.type == "cuda":
        return {name: measure_ceilings(device, dtype) for name, dtype in DTYPES.items()}
    found = {"float32": measure_ceilings(device, torch.float32, **CPU_SIZES)}
    if choose_dtype(device) == torch.bfloat16:
        return found | {"bfloat16": measure_ceilings(device, torch.bfloat16, **CPU_SIZES)}
    emulated = 2 * PROBE**3 / gemm_seconds(device)[torch.bfloat16]  # a larger GEMM would take seconds
    return found | {"bfloat16": found["float32"]._replace(flops=emulated)}
