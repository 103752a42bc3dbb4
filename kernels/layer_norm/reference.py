"""Layer normalisation with the residual addition fused: the definition.

    s = x + residual,   y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias

Statistics are over the last dimension.
"""

import torch.nn.functional as F
from torch import Tensor

from ..precision import wide


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Normalised sum, and the sum itself.

    x, residual: [..., d]; weight, bias: [d]. Returns y and s, [..., d] in x's dtype; s is x where there is no residual.
    Differentiable in x and residual.
    """
    s = wide(x) if residual is None else wide(x) + wide(residual)
    y = F.layer_norm(s, s.shape[-1:], wide(weight), None if bias is None else wide(bias), eps)
    return y.to(x.dtype), x if residual is None else s.to(x.dtype)
