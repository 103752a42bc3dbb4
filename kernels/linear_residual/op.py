"""linear_residual: public function, registration, gradient."""

import torch
from torch import Tensor

from ..linear_gelu.op import check_linear
from ..precision import wide
from ..registration import expect, refuse_trainable, register
from . import reference


def linear_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor | None = None) -> Tensor:
    """y = residual + gamma (x W^T + b).

    x: [..., k]; weight: [m, k]; bias, gamma: [m]; residual: [..., m], all of one dtype. Returns [..., m]. Differentiable in x and residual. Raises
    ValueError where shapes or dtypes do not fit or a weight requires a gradient.
    """
    check_linear("linear_residual", x, weight, bias)
    shape = (*x.shape[:-1], weight.shape[0])
    expect("linear_residual", residual.shape == shape and residual.dtype == x.dtype, f"residual must be {x.dtype} {shape}")
    expect("linear_residual", gamma is None or gamma.shape == shape[-1:] and gamma.dtype == x.dtype, f"gamma must be {x.dtype} [{shape[-1]}]")
    refuse_trainable("linear_residual", gamma=gamma)
    return _forward(x, weight, bias, residual, gamma)


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor | None) -> Tensor:
    """y [..., m]."""
    return torch.empty(residual.shape, dtype=x.dtype, device=x.device)


def _backward_fake(grad_y: Tensor, weight: Tensor, gamma: Tensor | None) -> Tensor:
    """Gradient [..., k] of x; that of residual is grad_y."""
    return torch.empty(*grad_y.shape[:-1], weight.shape[1], dtype=grad_y.dtype, device=grad_y.device)


def _backward_gelu_fake(grad_y: Tensor, weight: Tensor, gamma: Tensor | None, slope: Tensor) -> Tensor:
    """Gradient [..., k] of h where x = f(h): the backward of this layer and of the activation before it in one GEMM. slope: f'(h), as linear_gelu
    saves it."""
    return torch.empty(slope.shape, dtype=slope.dtype, device=slope.device)


def _forward_reference(x, weight, bias, residual, gamma):
    return reference.linear_residual(x, weight, bias, residual, gamma).contiguous()


def _backward_reference(grad_y, weight, gamma):
    return (wide(grad_y if gamma is None else wide(grad_y) * wide(gamma)) @ wide(weight)).to(grad_y.dtype)


def _backward_gelu_reference(grad_y, weight, gamma, slope):
    grad_x = wide(grad_y if gamma is None else wide(grad_y) * wide(gamma)) @ wide(weight)
    return (grad_x * wide(slope)).to(slope.dtype)


_forward = register("linear_residual", "forward", _forward_fake, _forward_reference)
_backward = register("linear_residual", "backward", _backward_fake, _backward_reference)
register("linear_residual", "backward_gelu", _backward_gelu_fake, _backward_gelu_reference)


def _save(ctx, inputs, output):
    _, weight, _, _, gamma = inputs
    ctx.save_for_backward(weight, gamma)


def _differentiate(ctx, grad_y):
    grad_x = _backward(grad_y, *ctx.saved_tensors) if ctx.needs_input_grad[0] else None
    return grad_x, None, None, grad_y, None


_forward.register_autograd(_differentiate, setup_context=_save)
