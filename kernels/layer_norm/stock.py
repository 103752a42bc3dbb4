"""layer_norm from PyTorch's own operations: an addition, then its fused normalisation; any device, float64 too."""

import torch
from torch import Tensor

from ..precision import wide


def _weight_like(weight: Tensor | None, s: Tensor) -> Tensor | None:
    """The weight in the dtype with which PyTorch keeps float32 statistics: float32 on the CPU, that of s elsewhere."""
    if weight is None or s.dtype == torch.float64 or s.device.type != "cpu":
        return None if weight is None else weight.to(s.dtype)
    return weight.float()


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, s, mean, rstd as in op.py."""
    s = x.contiguous() if residual is None else (x + residual).contiguous()
    y, mean, rstd = torch.native_layer_norm(s, s.shape[-1:], _weight_like(weight, s), _weight_like(bias, s), eps)
    return y, y.new_empty(0) if residual is None else s, wide(mean[..., 0]), wide(rstd[..., 0])


def backward(grad_y: Tensor, grad_s: Tensor | None, s: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, eps: float) -> Tensor:
    """Gradient of s."""
    s, weight, wanted = s.contiguous(), _weight_like(weight, s), [True, False, False]
    statistics = mean[..., None], rstd[..., None]
    grad, _, _ = torch.ops.aten.native_layer_norm_backward(grad_y.contiguous(), s, s.shape[-1:], *statistics, weight, None, wanted)
    return grad if grad_s is None else grad + grad_s
