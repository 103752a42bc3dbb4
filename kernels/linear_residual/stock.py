"""linear_residual from PyTorch's own operations: a GEMM, then the elementwise rest; any device, float64 too."""

import torch.nn.functional as F
from torch import Tensor


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor | None) -> Tensor:
    """y as in op.py."""
    y = F.linear(x.contiguous(), weight, bias)
    return (residual + y if gamma is None else residual.addcmul(y, gamma)).contiguous()


def backward(grad_y: Tensor, weight: Tensor, gamma: Tensor | None) -> Tensor:
    """Gradient of x. The layer scale goes into the weight, which has fewer elements than the gradient."""
    return grad_y.contiguous() @ (weight if gamma is None else gamma[:, None] * weight)


def backward_gelu(grad_y: Tensor, weight: Tensor, gamma: Tensor | None, slope: Tensor) -> Tensor:
    """Gradient of h, where x = f(h); slope: f'(h)."""
    return backward(grad_y, weight, gamma).mul_(slope)
