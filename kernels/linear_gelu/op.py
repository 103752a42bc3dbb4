"""linear_gelu: public function, registration, gradient."""

import torch
from torch import Tensor

from ..precision import wide
from ..registration import expect, gradients, refuse_trainable, register
from . import reference


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "gelu") -> Tensor:
    """y = f(x W^T + b).

    x: [..., k]; weight: [m, k]; bias: [m], all of one dtype; activation: "gelu", "gelu_tanh" or "quick_gelu". Returns [..., m].
    Differentiable in x. Raises ValueError where shapes, dtypes or the name do not fit or a weight requires a gradient.
    """
    expect("linear_gelu", activation in reference.ACTIVATIONS, f"activation must be one of {', '.join(reference.ACTIVATIONS)}, got {activation!r}")
    check_linear("linear_gelu", x, weight, bias)
    return _forward(x, weight, bias, activation, torch.is_grad_enabled() and x.requires_grad)[0]


def check_linear(operation: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError unless these are the arguments of a frozen linear layer."""
    k = x.shape[-1]
    expect(operation, weight.ndim == 2 and weight.shape[1] == k, f"weight must be [m, {k}] for x [..., {k}], got {tuple(weight.shape)}")
    expect(operation, bias is None or bias.shape == weight.shape[:1], f"bias must be [{weight.shape[0]}]")
    for name, tensor in (("weight", weight), ("bias", bias)):
        expect(operation, tensor is None or tensor.dtype == x.dtype, f"{name} must have x's dtype {x.dtype}")
    refuse_trainable(operation, weight=weight, bias=bias)


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, keep: bool) -> tuple[Tensor, Tensor]:
    """y = f(h) [..., m] for h = x W^T + b; f'(h) [..., m] where it is saved for backward, else [0]."""
    y = torch.empty(*x.shape[:-1], weight.shape[0], dtype=x.dtype, device=x.device)
    return y, torch.empty_like(y) if keep else y.new_empty(0)


def _backward_fake(grad_y: Tensor, slope: Tensor, weight: Tensor) -> Tensor:
    """Gradient [..., k] of x; slope: f'(h)."""
    return torch.empty(*slope.shape[:-1], weight.shape[1], dtype=slope.dtype, device=slope.device)


def _forward_reference(x, weight, bias, activation, keep):
    y = reference.linear_gelu(x, weight, bias, activation)
    if not keep:
        return y, y.new_empty(0)
    h = torch.nn.functional.linear(wide(x), wide(weight), None if bias is None else wide(bias))
    (slope,) = gradients(reference.ACTIVATIONS[activation], [h], [torch.ones_like(h)])
    return y, slope.to(x.dtype)


def _backward_reference(grad_y, slope, weight):
    return ((wide(grad_y) * wide(slope)) @ wide(weight)).to(slope.dtype)


_forward = register("linear_gelu", "forward", _forward_fake, _forward_reference)
_backward = register("linear_gelu", "backward", _backward_fake, _backward_reference)


def _save(ctx, inputs, output):
    _, weight, _, _, ctx.keep = inputs
    ctx.save_for_backward(output[1], weight)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, grad_y, _):
    if not ctx.keep:
        raise RuntimeError("smi::linear_gelu was called with keep=False: nothing was saved for backward")
    return _backward(grad_y, *ctx.saved_tensors), None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
