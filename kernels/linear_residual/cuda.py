"""linear_residual in CUDA C++ (csrc/cuda/linear*): GEMMs with TMA for compute capability 9.0, with the rest in their epilogues.

forward          y = residual + gamma (x W^T + b)
backward         dx = dy (gamma W)                nothing to fuse: PyTorch's GEMM
backward_gelu    dh = (dy (gamma W)) f'(h)        f'(h) as linear_gelu saves it
"""

import torch
from torch import Tensor

from ..cuda_calls import division_of, linear_unsupported, matrix, vector
from ..cuda_calls import linear_ensure_built as ensure_built
from ..cuda_calls import linear_is_built as is_built
from ..cuda_calls import linear_library as library
from ..cuda_calls import linear_unavailable as unavailable
from .stock import backward

__all__ = ["backward", "backward_gelu", "ensure_built", "forward", "is_built", "unavailable", "unsupported"]

LEFT_TO = "triton"  # where SMI_BACKEND=cuda: a few rows, other devices, no headers


def unsupported(function: str, *args) -> str | None:
    """Why raw `function` cannot run on `args`; None if it can."""
    return linear_unsupported(*args[:2])


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor | None) -> Tensor:
    """y as in op.py."""
    y = torch.empty(residual.shape, dtype=x.dtype, device=x.device)
    rows = matrix(x)
    division = division_of(rows, len(weight), stream_k=True)
    library().linear_residual(rows, matrix(weight), vector(bias), vector(gamma), matrix(residual), matrix(y), division)
    return y


def backward_gelu(grad_y: Tensor, weight: Tensor, gamma: Tensor | None, slope: Tensor) -> Tensor:
    """Gradient of h, [..., k]; slope: f'(h)."""
    weight = weight if gamma is None else gamma[:, None] * weight  # fewer elements than the gradient
    dh = torch.empty(slope.shape, dtype=slope.dtype, device=slope.device)
    rows = matrix(grad_y)
    library().linear_gelu_gradient(rows, matrix(weight), matrix(slope), matrix(dh), division_of(rows, weight.shape[1]))
    return dh
