"""Attention on the CPU in C++ (csrc/cpu): one head at a time, in a core's own cache."""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from smi.csrc import host

from ..cpp_calls import address, address_of_rows, call, dense, in_range

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class Params(ctypes.Structure):
    """As in csrc/cpu/attention.h."""

    _fields_ = [
        ("qkv", ctypes.c_void_p),
        ("stride", ctypes.c_int64 * 4),
        *((name, ctypes.c_void_p) for name in ("index", "lengths", "out", "lse", "shares", "grad", "dqkv")),
        *((name, ctypes.c_int64) for name in ("batch", "rows", "n", "heads", "width")),
        ("scale", ctypes.c_float),
    ]


unavailable, is_built, ensure_built = host.CPU.why_not, host.CPU.is_built, host.CPU.ensure_built


def differentiable(qkv: Tensor, *_) -> Callable | None:
    """The operation with its gradient in C++ (csrc/autograd/attention.cpp), for `dispatch.differentiable`; None where it cannot be had."""
    return None if unsupported("forward", qkv) or ensure_built() else host.operation("attention_eager")


def unsupported(function: str, *args) -> str | None:
    qkv = args[0 if function == "forward" else 1]
    if qkv.dtype not in DTYPES:
        return f"it takes float32, bfloat16 and float16, not {str(qkv.dtype).removeprefix('torch.')}"
    return None


def forward(qkv: Tensor, index: Tensor | None, lengths: Tensor | None, scale: float, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """out and lse as in op.py; the first in memory that the caller keeps, contiguous, where it is given."""
    batch, n, _, heads, width = qkv.shape
    n = n if index is None else index.shape[1]
    out = qkv.new_empty(batch, n, heads * width) if out is None else out
    lse = qkv.new_empty(batch, heads, n, dtype=torch.float32)
    _run("forward", qkv, index, lengths, scale, n, out=out, lse=lse)
    return out, lse


def backward(
    grad: Tensor,
    qkv: Tensor,
    index: Tensor | None,
    lengths: Tensor | None,
    out: Tensor | None,
    lse: Tensor,
    scale: float,
    dqkv: Tensor | None = None,
) -> Tensor:
    """Gradient of qkv; in dqkv where it is given. out is not read."""
    if dqkv is None:
        dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device="cpu")
    if index is not None or lengths is not None:
        dqkv.zero_()
    _run("backward", qkv, index, lengths, scale, lse.shape[2], lse=lse, grad=dense(grad), dqkv=dqkv)
    return dqkv


def _run(function: str, qkv: Tensor, index: Tensor | None, lengths: Tensor | None, scale: float, n: int, **tensors: Tensor) -> None:
    qkv = qkv if qkv.stride(-1) == 1 else dense(qkv)
    batch, rows, _, heads, width = qkv.shape
    shapes = dict.fromkeys(("out", "grad"), (batch, n, heads * width)) | {"lse": (batch, heads, n), "dqkv": (batch, rows, 3, heads, width)}
    at = {name: address(x, *shapes[name], dtype=torch.float32 if name == "lse" else qkv.dtype) for name, x in tensors.items()}
    for name, integers, shape, ends in (("index", index, (batch, n), (0, rows)), ("lengths", lengths, (batch,), (0, n + 1))):
        if integers is not None:
            in_range(name, integers, *ends)
            tensors[name] = integers.long().contiguous()
            at[name] = address(tensors[name], *shape, dtype=torch.int64)
    if n > rows and index is None:
        raise ValueError(f"attention among the first {n} tokens of {rows}")
    first = address_of_rows(qkv, batch, rows, 3, heads, width, dtype=qkv.dtype)
    params = Params(qkv=first, stride=qkv.stride()[:4], batch=batch, rows=rows, n=n, heads=heads, width=width, scale=scale, **at)
    call(f"smi_attention_{function}_{DTYPES[qkv.dtype]}", params, qkv, *tensors.values(), cost=8.0 * batch * heads * n * n * width)
