"""cls_attention on the CPU in C++ (csrc/cpu/cls_attention.cpp), float32 and bfloat16."""

import ctypes

import torch
from torch import Tensor

from smi.csrc import host

from ..cpp_calls import DTYPES, address, address_of_rows, call, dense, unless_taken


class Params(ctypes.Structure):
    """As in csrc/cpu/cls_attention.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "kv")),
        ("stride", ctypes.c_int64 * 4),
        *((name, ctypes.c_void_p) for name in ("out", "row", "weights", "grad", "grad_row", "dq", "dkv")),
        *((name, ctypes.c_int64) for name in ("batch", "queries", "tokens", "heads", "width")),
        ("scale", ctypes.c_float),
    ]


class Tokens(ctypes.Structure):
    """As in csrc/cpu/cls_attention.cpp."""

    _fields_ = [*((name, ctypes.c_void_p) for name in ("from", "to")), *((name, ctypes.c_int64) for name in ("batch", "tokens", "few", "width"))]


unavailable, is_built, ensure_built = host.CPU.why_not, host.CPU.is_built, host.CPU.ensure_built


def unsupported(function: str, *args) -> str | None:
    return unless_taken(*args)


def forward(q: Tensor, kv: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """out, row, weights as in op.py."""
    batch, queries, heads, width = q.shape
    tokens = kv.shape[1]
    out, row = q.new_empty(batch, queries, heads * width), q.new_empty(batch, tokens, dtype=torch.float32)
    weights = q.new_empty(batch, heads, queries, tokens, dtype=torch.float32)
    _run("forward", q, kv, scale, out=out, row=row, weights=weights)
    return out, row, weights


def backward(
    grad: Tensor | None, grad_row: Tensor | None, q: Tensor, kv: Tensor, weights: Tensor, scale: float, dkv: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of q and kv, contiguous, the second in dkv where that is given; grad or grad_row is None where the loss does not use it."""
    dq, dkv = q.new_empty(q.shape), kv.new_empty(kv.shape) if dkv is None else dkv
    grad, grad_row = (None if x is None else dense(x) for x in (grad, grad_row))
    _run("backward", q, kv, scale, weights=dense(weights), grad=grad, grad_row=grad_row, dq=dq, dkv=dkv)
    return dq, dkv


def _run(function: str, q: Tensor, kv: Tensor, scale: float, **tensors: Tensor | None) -> None:
    q, kv = dense(q), kv if kv.stride(-1) == 1 else dense(kv)
    (batch, queries, heads, width), count = q.shape, kv.shape[1]
    merged, shape = (batch, queries, heads * width), (batch, count, 2, heads, width)
    shapes = {"out": merged, "grad": merged, "weights": (batch, heads, queries, count), "dq": q.shape, "dkv": shape}
    shapes |= dict.fromkeys(("row", "grad_row"), (batch, count))
    dtypes = dict.fromkeys(("row", "grad_row", "weights"), torch.float32)
    at = {name: address(x, *shapes[name], dtype=dtypes.get(name, q.dtype)) for name, x in tensors.items()}
    at |= {"q": address(q, *q.shape, dtype=q.dtype), "kv": address_of_rows(kv, *shape, dtype=q.dtype)}
    params = Params(stride=kv.stride()[:4], batch=batch, queries=queries, tokens=count, heads=heads, width=width, scale=scale, **at)
    call(f"smi_cls_attention_{function}_{DTYPES[q.dtype]}", params, q, kv, *tensors.values(), cost=8.0 * q.numel() * count)


def take_tokens(x: Tensor, count: int) -> Tensor:
    """The first tokens [B, count, d] of x [B, T, d], contiguous."""
    found = x.new_empty(x.shape[0], count, x.shape[2])
    _move("take", x, found, x, count)
    return found


def add_tokens(x: Tensor, few: Tensor) -> None:
    """Add few [B, count, d] to the first tokens of x [B, T, d], in place; both contiguous."""
    _move("add", few, x, x, few.shape[1])


def _move(how: str, source: Tensor, target: Tensor, x: Tensor, count: int) -> None:
    (batch, tokens, width), few = x.shape, (x.shape[0], count, x.shape[2])
    if count > tokens:
        raise ValueError(f"{count} of {tokens} tokens")
    at = (address(tensor, *(x.shape if tensor is x else few), dtype=x.dtype) for tensor in (source, target))
    params = Tokens(*at, batch, tokens, count, width)
    call(f"smi_{how}_tokens_{DTYPES[x.dtype]}", params, source, target, cost=float(batch * count * width))
