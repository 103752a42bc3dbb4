"""The dtype that the fused engine computes in: asked for, or chosen for the device. bfloat16 is decided here."""

from functools import cache

import torch

from ..errors import InputError
from ..plain import shown

NATIVE_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")  # in /proc/cpuinfo
SUPPORTED = (torch.float32, torch.bfloat16, torch.float16)


def resolve_dtype(dtype: torch.dtype | str, device: torch.device) -> torch.dtype:
    """The dtype by its name, or the chosen one for "auto"; raises InputError where the fused engine does not compute in it."""
    if isinstance(dtype, str) and dtype == "auto":
        return choose_dtype(device)
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or found not in SUPPORTED:
        name = shown(dtype).removeprefix("torch.")
        raise InputError(f"the fused engine computes in float32, bfloat16 or float16, not {name}: pass engine='reference'")
    return found


def choose_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU that has it (compute capability 8.0 and up), and on a CPU that multiplies it natively: AVX-512 BF16, AMX, or Arm's BF16.
    Decided by instruction set, so that it is the same every time."""
    return _choice(device)[0]


def why_dtype(device: torch.device) -> str:
    """What "auto" is on a device, and why, in words."""
    dtype, reason = _choice(device)
    return f"{str(dtype).removeprefix('torch.')}: {reason}"


def _choice(device: torch.device) -> tuple[torch.dtype, str]:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return (torch.bfloat16 if major >= 8 else torch.float32), f"compute capability {major}.{minor}, bfloat16 from 8.0 on"
    native = [flag for flag in NATIVE_BFLOAT16 if flag in _processor_flags()]
    if native:
        return torch.bfloat16, f"the processor multiplies it ({', '.join(native)})"
    return torch.float32, f"the processor does not multiply bfloat16 (none of {', '.join(NATIVE_BFLOAT16)})"


@cache
def _processor_flags() -> set[str]:
    """The instruction sets of this processor, as Linux names them; none where it does not say."""
    try:
        with open("/proc/cpuinfo") as lines:
            listed = next((line.split(":", 1)[1] for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        return set()
    return set(listed.split())
