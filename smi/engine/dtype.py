"""The dtype that the fused engine computes in: asked for, or chosen for the device. bfloat16 is decided here."""

import time
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..errors import InputError

SUPPORTED = (torch.float32, torch.bfloat16, torch.float16)
GEMM = (192, 768, 768)  # rows, k, m: a few milliseconds
ROUNDS = 5
WORTH_IT = 0.7  # of float32's time; above it bfloat16's rounding buys too little


def resolve_dtype(dtype: torch.dtype | str, device: torch.device) -> torch.dtype:
    """The dtype by its name, or the chosen one for "auto"; raises InputError where the fused engine does not compute in it."""
    if dtype == "auto":
        return choose_dtype(device)
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in SUPPORTED:
        name = str(dtype).removeprefix("torch.")
        raise InputError(f"the fused engine computes in float32, bfloat16 or float16, not {name}: pass engine='reference'")
    return found


def choose_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU that has it (compute capability 8.0 and up); on the CPU where it is measured to be faster."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    return faster_dtype_on_cpu()


@cache
def faster_dtype_on_cpu() -> torch.dtype:
    """bfloat16 where a GEMM in it takes at most 0.7 of float32's time, as on processors with AVX-512 BF16 or AMX; measured once a process."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        rows, k, m = GEMM
        x, weight = torch.randn(rows, k).to(dtype), torch.randn(m, k).to(dtype)
        seconds[dtype] = min(_seconds(x, weight) for _ in range(ROUNDS))
    return torch.bfloat16 if seconds[torch.bfloat16] < WORTH_IT * seconds[torch.float32] else torch.float32


def _seconds(x: Tensor, weight: Tensor) -> float:
    start = time.perf_counter()
    linear(x, weight)
    return time.perf_counter() - start
