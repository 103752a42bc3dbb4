"""linear_gelu from PyTorch's own operations: a GEMM, then the activation; any device, float64 too."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import ACTIVATIONS

APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, keep: bool) -> tuple[Tensor, Tensor]:
    """y and f'(h) as in op.py."""
    h = F.linear(x.contiguous(), weight, bias)
    return ACTIVATIONS[activation](h), slope(h, activation) if keep else h.new_empty(0)


def backward(grad_y: Tensor, slope: Tensor, weight: Tensor) -> Tensor:
    """Gradient of x."""
    return (grad_y * slope) @ weight


def slope(h: Tensor, activation: str) -> Tensor:
    """f'(h)."""
    if activation in APPROXIMATE:
        return torch.ops.aten.gelu_backward(h.new_ones(()).expand_as(h), h, approximate=APPROXIMATE[activation])
    s = (1.702 * h).sigmoid()
    return s + 1.702 * h * s * (1 - s)
