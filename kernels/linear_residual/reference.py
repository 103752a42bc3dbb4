"""A linear layer added to the residual stream: the definition.

    y = residual + gamma * (x W^T + b)

gamma is the layer scale, 1 where the model has none.
"""

import torch.nn.functional as F
from torch import Tensor

from ..precision import wide


def linear_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor | None = None) -> Tensor:
    """x: [..., k]; weight: [m, k]; bias, gamma: [m]; residual: [..., m]. Returns [..., m]. Differentiable in x and residual."""
    y = F.linear(wide(x), wide(weight), None if bias is None else wide(bias))
    if gamma is not None:
        y = y * wide(gamma)
    return (wide(residual) + y).to(x.dtype)
