"""linear_gelu from PyTorch's own operations: a GEMM, then the activation; any device, float64 too."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import ACTIVATIONS

APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, keep: bool) -> tuple[Tensor, Tensor]:
    """y, h as in op.py."""
    h = F.linear(x.contiguous(), weight, bias)
    return ACTIVATIONS[activation](h), h if keep else h.new_empty(0)


def backward(grad_y: Tensor, h: Tensor, weight: Tensor, activation: str) -> Tensor:
    """Gradient of x."""
    return activation_gradient(grad_y, h, activation) @ weight


def activation_gradient(grad: Tensor, h: Tensor, activation: str) -> Tensor:
    """grad * f'(h)."""
    if activation in APPROXIMATE:
        return torch.ops.aten.gelu_backward(grad.contiguous(), h, approximate=APPROXIMATE[activation])
    s = (1.702 * h).sigmoid()
    return grad * (s + 1.702 * h * s * (1 - s))
