"""linear_residual in Triton: bias, layer scale and residual in the GEMM's epilogue; in backward the derivative of the activation before it.

    forward          y = residual + gamma (x W^T + b)
    backward         dx = dy (gamma W)                nothing to fuse: PyTorch's GEMM
    backward_gelu    dh = (dy (gamma W)) f'(h)        x = f(h), f'(h) as linear_gelu saved it; dx is never in memory

gamma is the layer scale, f the activation before, W the frozen weight.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compile_case import CompileCase
from ..matmul import TILES, Table, Tile, cases, choose, grid, halves, launch_options, product, tile_position, timed
from .stock import backward

# sm_90: the epilogue is one multiplication, so that 124 registers suffice for 128 x 128 by 8 warps, and two programs share a multiprocessor.
BACKWARD_TILES: Table = TILES | {
    (90, 2): (Tile(128, 128, 64, 8, 3, resident=2), Tile(64, 64, 64, 4, 4, resident=3)),
    (100, 2): (Tile(128, 128, 64, 8, 3, resident=2), Tile(64, 64, 64, 4, 4, resident=3)),
}

__all__ = ["backward", "backward_gelu", "compile_cases", "forward"]


@triton.jit
def linear_residual_fwd(
    p_x, p_w, p_bias, p_gamma, p_residual, p_y, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_GAMMA: tl.constexpr,
):  # fmt: skip
    """x: [M, K]; w: [N, K]; bias, gamma: [N]; residual, y: [M, N]; all contiguous."""
    i_m, i_n = tile_position(tl.program_id(0), M, N, BM, BN, GROUP)
    b_left, b_right = halves(product(p_x, p_w, i_m, i_n, M, N, K, BM, BN, BK, EVEN_K, True, PRECISION), BM, BN)
    o_m = tl.arange(0, BM)
    first = i_m.to(tl.int64) * BM * N
    for half in tl.static_range(2):
        o_n = i_n * BN + half * (BN // 2) + tl.arange(0, BN // 2)
        # [BM, BN / 2]
        b_y = b_left if half == 0 else b_right
        if HAS_BIAS:
            b_y += tl.load(p_bias + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
        if HAS_GAMMA:
            b_y *= tl.load(p_gamma + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
        o = o_m[:, None] * N + o_n[None, :]
        m = (o_m < M - i_m * BM)[:, None] & (o_n < N)[None, :]
        b_y += tl.load(p_residual + first + o, mask=m, other=0.0).to(tl.float32)
        tl.store(p_y + first + o, b_y.to(p_y.dtype.element_ty), mask=m)


@triton.jit
def linear_residual_bwd_gelu(
    p_dy, p_w, p_slope, p_dh, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dy: [M, K]; w: [K, N]; slope, dh: [M, N]; all contiguous; K is the contraction, the layer's output width."""
    i_m, i_n = tile_position(tl.program_id(0), M, N, BM, BN, GROUP)
    b_left, b_right = halves(product(p_dy, p_w, i_m, i_n, M, N, K, BM, BN, BK, EVEN_K, False, PRECISION), BM, BN)
    o_m = tl.arange(0, BM)
    first = i_m.to(tl.int64) * BM * N
    for half in tl.static_range(2):
        o_n = i_n * BN + half * (BN // 2) + tl.arange(0, BN // 2)
        o = o_m[:, None] * N + o_n[None, :]
        m = (o_m < M - i_m * BM)[:, None] & (o_n < N)[None, :]
        # [BM, BN / 2]
        b_dx = b_left if half == 0 else b_right
        b_slope = tl.load(p_slope + first + o, mask=m, other=0.0).to(tl.float32)
        tl.store(p_dh + first + o, (b_dx * b_slope).to(p_dh.dtype.element_ty), mask=m)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor | None) -> Tensor:
    """y as in op.py."""
    x, weight, residual = x.contiguous(), weight.contiguous(), residual.contiguous()
    N, K = weight.shape
    y = torch.empty(residual.shape, dtype=x.dtype, device=x.device)
    M = y.numel() // N
    if M:
        tile = timed("linear_residual", "fwd", choose(TILES, M, N, K, x.device, x.dtype), M, N, K, x)
        linear_residual_fwd[grid(tile, M, N)](
            x, weight, weight if bias is None else bias.contiguous(), weight if gamma is None else gamma.contiguous(), residual, y, M, N, K,
            **launch_options(tile, K, x.dtype), HAS_BIAS=bias is not None, HAS_GAMMA=gamma is not None,
        )  # fmt: skip
    return y


def backward_gelu(grad_y: Tensor, weight: Tensor, gamma: Tensor | None, slope: Tensor) -> Tensor:
    """Gradient of h, [..., k], where x = f(h); slope: f'(h)."""
    grad_y, slope = grad_y.contiguous(), slope.contiguous()
    weight = weight.contiguous() if gamma is None else gamma[:, None] * weight  # fewer elements than the gradient
    K, N = weight.shape
    dh = torch.empty_like(slope)
    M = slope.numel() // N
    if M:
        tile = timed("linear_residual", "bwd_gelu", choose(BACKWARD_TILES, M, N, K, slope.device, slope.dtype), M, N, K, slope)
        linear_residual_bwd_gelu[grid(tile, M, N)](grad_y, weight.contiguous(), slope, dh, M, N, K, **launch_options(tile, K, slope.dtype))
    return dh


def compile_cases() -> list[CompileCase]:
    """Both kernels in every tile, with everything fused."""
    fused = {"HAS_BIAS": True, "HAS_GAMMA": True}
    return [
        *cases("linear_residual/fwd", linear_residual_fwd, "x w bias gamma residual y", TILES, fused),
        *cases("linear_residual/bwd_gelu", linear_residual_bwd_gelu, "dy w slope dh", BACKWARD_TILES, {}),
    ]
