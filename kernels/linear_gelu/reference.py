"""A linear layer followed by its activation: the definition.

    h = x W^T + b,   y = f(h)

f is one of

    gelu        h * Phi(h) = h/2 * (1 + erf(h / sqrt 2))
    gelu_tanh   h/2 * (1 + tanh(sqrt(2/pi) * (h + 0.044715 h^3)))
    quick_gelu  h * sigmoid(1.702 h)

They are the activations of timm's Vision Transformers.
"""

from functools import partial

import torch.nn.functional as F
from torch import Tensor

from ..precision import wide


def quick_gelu(h: Tensor) -> Tensor:
    return h * (1.702 * h).sigmoid()


ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "quick_gelu": quick_gelu}


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "gelu") -> Tensor:
    """x: [..., k]; weight: [m, k]; bias: [m]; activation: a name of ACTIVATIONS. Returns [..., m]. Differentiable in x."""
    h = F.linear(wide(x), wide(weight), None if bias is None else wide(bias))
    return ACTIVATIONS[activation](h).to(x.dtype)
