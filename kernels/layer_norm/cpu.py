"""layer_norm on the CPU in C++ (csrc/cpu/norm.cpp), float32 and bfloat16."""

import ctypes

import torch
from torch import Tensor

from smi.csrc import host

from ..cpp_calls import DTYPES, address, call, dense, unless_taken


class Params(ctypes.Structure):
    """As in csrc/cpu/norm.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "residual", "weight", "bias", "s", "y", "mean", "rstd", "grad", "grad_s", "found")),
        *((name, ctypes.c_int64) for name in ("m", "d")),
        ("eps", ctypes.c_float),
    ]


unavailable, is_built, ensure_built = host.CPU.why_not, host.CPU.is_built, host.CPU.ensure_built


def unsupported(function: str, *args) -> str | None:
    return unless_taken(*args)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, s, mean, rstd as in op.py; y in out, contiguous, where there is one."""
    x = dense(x)
    y = x.new_empty(x.shape) if out is None else out
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    s = x.new_empty(0) if residual is None else x.new_empty(x.shape)
    residual = None if residual is None else dense(residual)
    named = {"x": x, "residual": residual, "weight": _floats(weight), "bias": None if bias is None else _floats(bias)}
    _run("forward", x, eps, **named, s=s, y=y, mean=mean, rstd=rstd)
    return y, s, mean, rstd


def backward(
    grad_y: Tensor, grad_s: Tensor | None, s: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, eps: float, out: Tensor | None = None
) -> Tensor:
    """Gradient of s, in out where there is one, which may be grad_s."""
    s = dense(s)
    found = s.new_empty(s.shape) if out is None else out
    named = {"grad": dense(grad_y), "grad_s": None if grad_s is None else dense(grad_s), "weight": _floats(weight)}
    _run("backward", s, eps, x=s, **named, mean=mean, rstd=rstd, found=found)
    return found


def _floats(weight: Tensor) -> Tensor:
    return weight.float().contiguous()


def _run(function: str, rows: Tensor, eps: float, **tensors: Tensor | None) -> None:
    d, statistics = rows.shape[-1], rows.shape[:-1]
    shapes = dict.fromkeys(("weight", "bias"), (d,)) | dict.fromkeys(("mean", "rstd"), statistics)  # float32
    if function == "forward" and tensors["residual"] is None:
        tensors["s"] = None  # not written
    at = {
        name: address(tensor, *shapes[name]) if name in shapes else address(tensor, *rows.shape, dtype=rows.dtype) for name, tensor in tensors.items()
    }
    params = Params(**at, m=statistics.numel(), d=d, eps=eps)
    call(f"smi_layer_norm_{function}_{DTYPES[rows.dtype]}", params, *tensors.values(), cost=16.0 * rows.numel())
