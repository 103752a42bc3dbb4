"""attention: public function, registration, gradient."""

from typing import NoReturn

import torch
from torch import Tensor

from .. import dispatch
from ..precision import wide
from ..registration import gradients, register
from . import reference

INTEGERS = (torch.int32, torch.int64)


def attention(qkv: Tensor, index: Tensor | None = None, lengths: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Attention output with heads merged.

    qkv: [B, L, 3, H, D], any strides; index: int32 or int64 [B, n], distinct rows of qkv to attend among, all L when None; lengths: int32 or int64
    [B], 1 <= length <= n, tokens of each image that are real; scale: D ** -0.5 when None. Returns [B, n, H * D]; rows past an image's length are
    zero. Differentiable in qkv: rows that are not named, or past the length, get exact zeros. Raises ValueError where shapes or dtypes do not fit, on
    the CPU IndexError where index or lengths are out of range (on a GPU that would wait for the device).
    """
    direct = dispatch.differentiable("attention", qkv, index, lengths)
    if direct is None:
        _check(qkv, index, lengths)
        return _forward(qkv, index, lengths, qkv.shape[-1] ** -0.5 if scale is None else float(scale))[0]
    try:
        return direct(qkv, index, lengths, None if scale is None else float(scale))
    except ValueError:  # it checks the same in less time, and does not say what is wrong
        _check(qkv, index, lengths)
        raise


def _check(qkv: Tensor, index: Tensor | None, lengths: Tensor | None) -> None:
    if not (qkv.ndim == 5 and qkv.shape[2] == 3 and qkv.is_floating_point()):
        _refuse(f"qkv must be floating point [B, L, 3, H, D], got {qkv.dtype} {tuple(qkv.shape)}")
    batch, rows, _, heads, width = qkv.shape
    if not (rows and heads and width):
        _refuse(f"qkv must have at least one token, head and element, got {qkv.dtype} {tuple(qkv.shape)}")
    if index is not None and not (index.dtype in INTEGERS and index.ndim == 2 and index.shape[0] == batch and 1 <= index.shape[1] <= rows):
        _refuse(f"index must be int32 or int64 [{batch}, n], 1 <= n <= {rows}, got {index.dtype} {tuple(index.shape)}")
    if lengths is not None and not (lengths.dtype in INTEGERS and lengths.shape == (batch,)):
        _refuse(f"lengths must be int32 or int64 [{batch}], got {lengths.dtype} {tuple(lengths.shape)}")
    for name, tensor in (("index", index), ("lengths", lengths)):
        if tensor is not None and tensor.device != qkv.device:
            _refuse(f"{name} must be on {qkv.device}, like qkv")


def _refuse(message: str) -> NoReturn:  # not `expect`, whose messages are written at every call
    raise ValueError(f"attention: {message}")


def _forward_fake(qkv: Tensor, index: Tensor | None, lengths: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """out [B, n, H * D]; lse [B, H, n], log of the sum of exponentials of each query's scores, float32 (float64 for float64)."""
    batch, n, _, heads, width = qkv.shape
    n = n if index is None else index.shape[1]
    return qkv.new_empty(batch, n, heads * width), qkv.new_empty(batch, heads, n, dtype=torch.promote_types(qkv.dtype, torch.float32))


def _backward_fake(grad: Tensor, qkv: Tensor, index: Tensor | None, lengths: Tensor | None, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    """Gradient [B, L, 3, H, D] of qkv, contiguous."""
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)


def _forward_reference(qkv, index, lengths, scale):
    q, k, _ = wide(qkv if index is None else reference.take_rows(qkv, index)).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-1, -2) * scale
    if lengths is not None:
        past = torch.arange(q.shape[2], device=qkv.device) >= lengths[:, None]
        scores = scores.masked_fill(past[:, None, None, :], float("-inf"))
    lse = scores.logsumexp(-1)
    return reference.attention(qkv, index, lengths, scale), lse.to(torch.promote_types(qkv.dtype, torch.float32))


def _backward_reference(grad, qkv, index, lengths, out, lse, scale):
    return gradients(lambda qkv: reference.attention(qkv, index, lengths, scale), [qkv], [grad])[0]


_forward = register("attention", "forward", _forward_fake, _forward_reference)
_backward = register("attention", "backward", _backward_fake, _backward_reference)


def _save(ctx, inputs, output):
    qkv, index, lengths, ctx.scale = inputs
    ctx.save_for_backward(qkv, index, lengths, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _):
    return None if grad is None else _backward(grad, *ctx.saved_tensors, ctx.scale), None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
