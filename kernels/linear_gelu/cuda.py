"""linear_gelu in CUDA C++ (csrc/cuda/linear*): bias, exact GELU and what backward needs in the epilogue of a GEMM with TMA; compute capability 9.0.

backward is PyTorch's own: TMA brings dy to the tensor cores without passing registers, where it could be multiplied by f'. The engine does not call
it: the layer behind has f' in its epilogue (`linear_residual.backward_gelu`).
"""

import torch
from torch import Tensor

from ..cuda_calls import division_of, linear_unsupported, matrix, vector
from ..cuda_calls import linear_ensure_built as ensure_built
from ..cuda_calls import linear_is_built as is_built
from ..cuda_calls import linear_library as library
from ..cuda_calls import linear_unavailable as unavailable
from .stock import backward

__all__ = ["backward", "ensure_built", "forward", "is_built", "unavailable", "unsupported"]

LEFT_TO = "triton"  # where SMI_BACKEND=cuda: a few rows, other devices, no headers
EPILOGUE = 5760  # cycles of a scheduler for GELU and f' of a large tile, by about 30 instructions a number: no other tile hides them (csrc/README.md)


def unsupported(function: str, *args) -> str | None:
    """Why raw `function` cannot run on `args`; None if it can."""
    if function == "forward":
        x, weight, _, activation, _ = args
        return linear_unsupported(x, weight, activation)
    grad, _, weight = args
    return linear_unsupported(grad, weight)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, keep: bool) -> tuple[Tensor, Tensor]:
    """y and f'(h) as in op.py."""
    y = torch.empty(*x.shape[:-1], weight.shape[0], dtype=x.dtype, device=x.device)
    slope = torch.empty_like(y) if keep else y.new_empty(0)
    rows = matrix(x)
    division = division_of(rows, len(weight), exposed=EPILOGUE)
    library().linear_gelu(rows, matrix(weight), vector(bias), matrix(y), matrix(slope) if keep else None, division)
    return y, slope
