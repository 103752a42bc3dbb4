"""The dtype that the fused engine computes in: asked for, or chosen for the device. bfloat16 is decided here."""

from functools import cache

import torch

from ..errors import InputError

NATIVE_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")  # in /proc/cpuinfo
SUPPORTED = (torch.float32, torch.bfloat16, torch.float16)


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
    """bfloat16 on a GPU that has it (compute capability 8.0 and up); on a CPU that multiplies it natively."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    return faster_dtype_on_cpu()


@cache
def faster_dtype_on_cpu() -> torch.dtype:
    """bfloat16 on processors that multiply it natively: AVX-512 BF16, AMX, or Arm's BF16. Decided by instruction set, so that it is the same every
    time."""
    return torch.bfloat16 if any(flag in _processor_flags() for flag in NATIVE_BFLOAT16) else torch.float32


def _processor_flags() -> set[str]:
    """The instruction sets of this processor, as Linux names them; none where it does not say."""
    try:
        with open("/proc/cpuinfo") as lines:
            listed = next((line.split(":", 1)[1] for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        return set()
    return set(listed.split())
