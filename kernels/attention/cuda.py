"""Attention in CUDA C++ (csrc/cuda): bfloat16 and float16, short sequences. The library that was installed, or one built on first use."""

from functools import cache

import torch
from torch import Tensor

from smi.csrc import build

from .. import cuda_calls
from ..cuda_calls import DTYPES, contiguous_aligned

MOST_TOKENS = {32: 256, 64: 256, 80: 192, 128: 128}  # by compiled width; as csrc/cuda/attention.h, which a test compares
MOST_TOKENS_99KB = {32: 256, 64: 144, 80: 128, 128: 80}  # of these, what fits where a block gets 99 KiB of shared memory (8.6, 8.9, 12.x)
ENOUGH_SHARED = 163 * 1024  # bytes a block gets elsewhere (8.0): all of MOST_TOKENS fit
OLDEST_DEVICE = (8, 0)


@cache
def unavailable() -> str | None:
    """Why this version cannot run on this machine, in one sentence; None if it can. Asked once a process; compiles nothing."""
    return cuda_calls.unavailable(build.ATTENTION, OLDEST_DEVICE)


def is_built() -> bool:
    """Whether the library was installed or is in the cache, for the current device."""
    return cuda_calls.is_built(build.ATTENTION)


@cache
def ensure_built() -> str | None:
    """Load the library, compiled first where it was not installed; why it cannot be had, which is also printed. Tried once a process."""
    return cuda_calls.ensure_built(build.ATTENTION)


def supports(n: int, width: int, dtype: torch.dtype, most_tokens: dict[int, int] = MOST_TOKENS) -> str | None:
    """Why `n` tokens at head width `width` in `dtype` are not covered, in one sentence; None if they are."""
    if dtype not in DTYPES:
        return f"it takes bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if width % 8 or not 8 <= width <= max(most_tokens):
        return f"it takes head widths that are multiples of 8 up to {max(most_tokens)}, not {width}"
    most = next(most for compiled, most in most_tokens.items() if width <= compiled)
    return None if 1 <= n <= most else f"it takes 1 to {most} tokens at head width {width} on this device, not {n}"


def unsupported(function: str, *args) -> str | None:
    """Why raw `function` cannot run on `args`; None if it can."""
    reason = unavailable()
    if reason:
        return reason
    qkv, index = args[:2] if function == "forward" else args[1:3]
    shared = torch.cuda.get_device_properties(qkv.device).shared_memory_per_block_optin
    return supports(tokens_of(qkv, index), qkv.shape[-1], qkv.dtype, MOST_TOKENS if shared >= ENOUGH_SHARED else MOST_TOKENS_99KB)


def forward(qkv: Tensor, index: Tensor | None, lengths: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Output [B, n, H * D] in the dtype of qkv [B, L, 3, H, D], and log(sum(exp(scores))) [B, H, n] in float32."""
    batch, _, _, heads, width = qkv.shape
    n = tokens_of(qkv, index)
    out = qkv.new_empty(batch, n, heads * width)
    lse = qkv.new_empty(batch, heads, n, dtype=torch.float32)
    library().attention_forward(contiguous_aligned(qkv), integers(index), integers(lengths), scale, out, lse)
    return out, lse


def backward(grad: Tensor, qkv: Tensor, index: Tensor | None, lengths: Tensor | None, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    """Gradient in qkv, contiguous: zero in rows that are no token's. Repeats bit for bit."""
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    grad, qkv, out = map(contiguous_aligned, (grad, qkv, out))
    library().attention_backward(grad, qkv, integers(index), integers(lengths), out, lse.contiguous(), scale, grad_qkv)
    return grad_qkv


def tokens_of(qkv: Tensor, index: Tensor | None) -> int:
    return qkv.shape[1] if index is None else index.shape[1]


def integers(x: Tensor | None) -> Tensor | None:
    """x in the dtypes and order that the kernels take."""
    if x is None:
        return None
    return (x if x.dtype in (torch.int32, torch.int64) else x.long()).contiguous()


@cache
def library():
    """torch.ops.smi_cuda, loaded once; built first where it was not installed. Raises RuntimeError where that fails."""
    return cuda_calls.load(build.ATTENTION)
