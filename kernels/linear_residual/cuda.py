"""linear_residual in CUDA C++ (csrc/cuda/linear*): GEMMs with TMA for compute capability 9.0, with the rest in their epilogues.

forward          y = residual + gamma (x W^T + b)
backward         dx = dy (gamma W)                nothing to fuse: PyTorch's GEMM
backward_gelu    dh = (dy (gamma W)) f'(h)        f'(h) as linear_gelu saves it
"""

from functools import cache

import torch
from torch import Tensor

from ..cuda_calls import linear_ensure_built as ensure_built
from ..cuda_calls import linear_is_built as is_built
from ..cuda_calls import linear_library as library
from ..cuda_calls import linear_unavailable as unavailable
from ..cuda_calls import linear_unsupported, matrix, vector
from .stock import backward

__all__ = ["backward", "backward_gelu", "ensure_built", "forward", "is_built", "unavailable", "unsupported"]

LEFT_TO = "triton"  # where SMI_BACKEND=cuda: a few rows, other devices, no headers
BM, BN, BK = 128, 192, 64  # as Tile in csrc/cuda/linear_gemm.cuh
STEP = 768  # cycles of the tensor cores for BM x BN x BK multiply-adds, 2048 a cycle
FIX_UP = 5000  # cycles to add one part of a tile to the others: 98,304 bytes, read and written, at 40 a cycle (assumed)


def unsupported(function: str, *args) -> str | None:
    """Why raw `function` cannot run on `args`; None if it can."""
    return linear_unsupported(*args[:2])


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor | None) -> Tensor:
    """y as in op.py."""
    y = torch.empty(residual.shape, dtype=x.dtype, device=x.device)
    rows = matrix(x)
    stream_k = divide_contraction(len(rows), *weight.shape, multiprocessors(x.device))
    library().linear_residual(rows, matrix(weight), vector(bias), vector(gamma), matrix(residual), matrix(y), stream_k)
    return y


def backward_gelu(grad_y: Tensor, weight: Tensor, gamma: Tensor | None, slope: Tensor) -> Tensor:
    """Gradient of h, [..., k]; slope: f'(h)."""
    weight = weight if gamma is None else gamma[:, None] * weight  # fewer elements than the gradient
    dh = torch.empty(slope.shape, dtype=slope.dtype, device=slope.device)
    library().linear_gelu_gradient(matrix(grad_y), matrix(weight), matrix(slope), matrix(dh))
    return dh


def divide_contraction(M: int, N: int, K: int, processors: int) -> bool:
    """Whether fewer cycles go by, by count, where every multiprocessor takes an equal part of all steps (stream-K) instead of whole tiles.

    Whole tiles leave multiprocessors idle in the last wave, most at N = 768. Parts of a tile are added one after the other, in a fixed order, so that
    results repeat bit for bit: that pays for long contractions only.
    """
    tiles = 2 * -(-M // (2 * BM)) * -(-N // BN)  # in clusters of two tiles of rows
    steps = -(-K // BK)
    whole = -(-tiles // processors) * steps * STEP
    others = -(-processors // tiles)  # that add to the same tile
    return -(-tiles * steps // processors) * STEP + others * FIX_UP < whole


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
