"""layer_norm: public function, registration, gradient."""

import torch
from torch import Tensor

from ..precision import wide
from ..registration import expect, gradients, refuse_trainable, register
from . import reference


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y = normalised s = x + residual, and s itself.

    x, residual: [..., d], same dtype; weight, bias: [d]. Returns y and s, [..., d] in x's dtype; s is x itself where there is no residual.
    Differentiable in x and residual. Raises ValueError where shapes or dtypes do not fit or a weight requires a gradient.
    """
    d = x.shape[-1]
    expect("layer_norm", x.is_floating_point() and d > 0, f"x must be floating point [..., d], got {x.dtype} {tuple(x.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        expect("layer_norm", tensor is None or tensor.shape == (d,), f"{name} must be [{d}]")
    if residual is not None:
        expect("layer_norm", residual.shape == x.shape and residual.dtype == x.dtype, f"residual must be {x.dtype} {tuple(x.shape)}, like x")
    refuse_trainable("layer_norm", weight=weight, bias=bias)
    y, s, _, _ = _forward(x, weight, bias, eps, residual)
    return y, x if residual is None else s


def statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y [..., d]; s [..., d], [0] without a residual; mean and rstd [...], float32 (float64 for float64)."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    s = y.new_empty(0) if residual is None else torch.empty_like(y)
    mean = y.new_empty(x.shape[:-1], dtype=statistics_dtype(x))
    return y, s, mean, torch.empty_like(mean)


def _backward_fake(grad_y: Tensor, grad_s: Tensor | None, s: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, eps: float) -> Tensor:
    """Gradient [..., d] of s, which is that of x and of residual."""
    return torch.empty(s.shape, dtype=s.dtype, device=s.device)


def _forward_reference(x, weight, bias, eps, residual):
    y, s = reference.layer_norm(x, weight, bias, eps, residual)
    mean = wide(s).mean(-1)
    rstd = ((wide(s) - mean[..., None]).square().mean(-1) + eps).rsqrt()
    return y.contiguous(), y.new_empty(0) if residual is None else s.contiguous(), mean, rstd


def _backward_reference(grad_y, grad_s, s, weight, mean, rstd, eps):
    return gradients(lambda s: reference.layer_norm(s, weight, None, eps), [s], [grad_y, grad_s])[0]


_forward = register("layer_norm", "forward", _forward_fake, _forward_reference)
_backward = register("layer_norm", "backward", _backward_fake, _backward_reference)


def _save(ctx, inputs, output):
    x, weight, _, ctx.eps, residual = inputs
    _, s, mean, rstd = output
    ctx.fused = residual is not None
    ctx.save_for_backward(x if residual is None else s, weight, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd, *([s] if residual is None else []))
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_y, grad_s, *_):
    grad_s = grad_s if ctx.fused else None  # without a residual s is a placeholder
    grad = grad_s if grad_y is None else _backward(grad_y, grad_s, *ctx.saved_tensors, ctx.eps)
    return grad, None, None, None, grad if ctx.fused else None


_forward.register_autograd(_differentiate, setup_context=_save)
