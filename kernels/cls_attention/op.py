"""cls_attention: public function, registration, gradient."""

import torch
from torch import Tensor

from ..precision import wide
from ..registration import expect, gradients, register
from . import reference


def cls_attention(q: Tensor, kv: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Output of a few prefix queries, and the attention that the first, CLS, pays to every token.

    q: [B, P, H, D]; kv: [B, T, 2, H, D], same dtype, any strides; scale: D ** -0.5 when None. Returns out [B, P, H * D] and row [B, T], the mean over
    heads of the weights of query 0, float32 (float64 for float64), each row summing to 1. Differentiable in q and kv, through both results. Raises
    ValueError where shapes or dtypes do not fit.
    """
    got = f"{q.dtype} {tuple(q.shape)} and {kv.dtype} {tuple(kv.shape)}"
    fits = q.is_floating_point() and q.ndim == 4 and kv.ndim == 5 and kv.shape[2] == 2
    expect("cls_attention", fits, f"q and kv must be [B, P, H, D] and [B, T, 2, H, D], got {got}")
    expect("cls_attention", q.shape[0] == kv.shape[0] and q.shape[2:] == kv.shape[3:], f"q and kv must agree in B, H and D, got {got}")
    expect("cls_attention", q.dtype == kv.dtype and q.device == kv.device, f"q and kv must agree in dtype and device, got {got}")
    expect("cls_attention", min(*q.shape[1:], kv.shape[1]) > 0, f"there must be at least one query, token, head and element, got {got}")
    return _forward(q, kv, q.shape[-1] ** -0.5 if scale is None else float(scale))[:2]


def _forward_fake(q: Tensor, kv: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, P, H * D]; row [B, T] and weights [B, H, P, T], float32 (float64 for float64)."""
    batch, queries, heads, width = q.shape
    tokens, weights = kv.shape[1], torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty(batch, queries, heads * width)
    return out, q.new_empty(batch, tokens, dtype=weights), q.new_empty(batch, heads, queries, tokens, dtype=weights)


def _backward_fake(grad: Tensor | None, grad_row: Tensor | None, q: Tensor, kv: Tensor, weights: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Gradients [B, P, H, D] of q and [B, T, 2, H, D] of kv, contiguous."""
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty(kv.shape, dtype=kv.dtype, device=kv.device)


def _forward_reference(q, kv, scale):
    out, row = reference.cls_attention(q, kv, scale)
    weights = (wide(q).transpose(1, 2) @ wide(kv[:, :, 0]).permute(0, 2, 3, 1) * scale).softmax(-1)
    dtype = torch.promote_types(q.dtype, torch.float32)
    return out.contiguous(), row.to(dtype), weights.to(dtype)


def _backward_reference(grad, grad_row, q, kv, weights, scale):
    return gradients(lambda q, kv: reference.cls_attention(q, kv, scale), [q, kv], [grad, grad_row])


_forward = register("cls_attention", "forward", _forward_fake, _forward_reference)
_backward = register("cls_attention", "backward", _backward_fake, _backward_reference)


def _save(ctx, inputs, output):
    q, kv, ctx.scale = inputs
    ctx.save_for_backward(q, kv, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, grad_row, _):
    if grad is None and grad_row is None:
        return None, None, None
    return *_backward(grad, grad_row, *ctx.saved_tensors, ctx.scale), None


_forward.register_autograd(_differentiate, setup_context=_save)
