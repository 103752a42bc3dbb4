"""image_step and the norms of the total variation on the CPU in C++ (csrc/cpu/pixels.cpp), float32."""

import ctypes

import torch
from torch import Tensor

from smi.csrc import host

from ..cpp_calls import address
from ..patch_embed.cpu import described
from . import stock

MOST = 256  # pixels on a side of a patch, as in csrc/cpu/pixels.cpp


class Step(ctypes.Structure):
    """As in csrc/cpu/pixels.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("images", "grad", "avg", "avg_sq", "out", "pull", "low", "high", "norms")),
        *((name, ctypes.c_float) for name in ("tv_weight", "beta1", "rest1", "beta2", "rest2", "eps", "rate", "correction")),
    ]


unavailable, is_built, ensure_built = host.CPU.why_not, host.CPU.is_built, host.CPU.ensure_built


def unsupported(function: str, *args) -> str | None:
    written = args[:4] if function == "forward" else args[:1]
    if any(tensor.dtype != torch.float32 for tensor in written):
        return "it takes float32 alone"
    if function == "forward" and (args[8] > MOST or args[7] is None and any(side % args[8] for side in args[0].shape[2:])):
        return f"it takes images that divide into patches of at most {MOST} pixels"
    return None


def forward(
    images: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, low: Tensor, high: Tensor, index: Tensor | None, patch_size: int,
    norms: Tensor | None, tv_weight: float, lr: float, beta1: float, beta2: float, eps: float, out: Tensor | None,
) -> None:  # fmt: skip
    """One step, as in op.py: moments in place, pixels in place or to out."""
    batch, _, height, width = images.shape
    if index is None:
        index = torch.arange(height // patch_size * (width // patch_size), device="cpu").expand(batch, -1)
    patches, index = described(index, None, patch_size, *images.shape[1:])
    count, pull = int(step), None
    if tv_weight:
        pull, norms = images.new_empty(index.numel() * images.shape[1] * patch_size**2), norms.float().contiguous()
    bounds = [bound.float().contiguous() for bound in (low, high)]
    grad = grad.contiguous()  # named, so that it lives as long as the call
    like = (images, grad, exp_avg, exp_avg_sq, out)
    if len(index) != batch or patch_size > MOST:
        raise ValueError(f"index must have {batch} rows and patches at most {MOST} pixels a side, got {len(index)} and {patch_size}")
    pointers = [address(tensor, *images.shape) for tensor in like]
    pointers += [address(pull, *(() if pull is None else pull.shape)), *(address(bound, images.shape[1]) for bound in bounds)]
    pointers.append(address(norms if tv_weight else None, 4))
    state = Step(*pointers, tv_weight, beta1, 1 - beta1, beta2, 1 - beta2, eps, lr / (1 - beta1**count), 1 / (1 - beta2**count))
    host.library().smi_image_step(ctypes.byref(patches), ctypes.byref(state))


def tv_norms(images: Tensor) -> Tensor:
    """The four norms [4] of images [B, C, H, W]."""
    images, norms = images.contiguous(), images.new_empty(4)
    planes, (height, width) = images.shape[0] * images.shape[1], images.shape[2:]
    partial = images.new_empty(planes, 4, dtype=torch.float64)
    sizes = map(ctypes.c_int64, (planes, height, width))
    at = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (partial, norms))
    host.library().smi_tv_norms(ctypes.c_void_p(address(images, *images.shape)), *sizes, *at)
    return norms


tv_norms_backward = stock.tv_norms_backward
