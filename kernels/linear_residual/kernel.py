"""linear_residual in Triton: bias, layer scale and residual in the GEMM's epilogue; in backward the derivative of the activation before it.

    forward          y = residual + gamma (x W^T + b)
    backward         dx = dy (gamma W)                nothing to fuse: PyTorch's GEMM
    backward_gelu    dh = (dy (gamma W)) f'(h)        x = f(h); neither dx nor the derivative exists in memory

gamma is the layer scale, f the activation before, W the frozen weight.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compile_case import CompileCase
from ..matmul import TILES, Table, Tile, cases, choose, grid, halves, launch_options, product, slope, tile_position, timed
from .stock import backward

# The derivative needs registers: 128 x 256, and 128 x 128 by 4 warps, spill on sm_90, 64 x 64 in steps of 32 on sm_100 (compile gate).
BACKWARD_TILES: Table = TILES | {
    (90, 2): (Tile(128, 128, 64, 8, 4), Tile(64, 64, 64, 4, 4)),
    (100, 2): (Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 4)),
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
    p_dy, p_w, p_h, p_dh, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """dy: [M, K]; w: [K, N]; h, dh: [M, N]; all contiguous; K is the contraction, the layer's output width."""
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
        b_h = tl.load(p_h + first + o, mask=m, other=0.0).to(tl.float32)
        tl.store(p_dh + first + o, (b_dx * slope(b_h, ACTIVATION)).to(p_dh.dtype.element_ty), mask=m)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor | None) -> Tensor:
    """y as in op.py."""
    x, weight, residual = x.contiguous(), weight.contiguous(), residual.contiguous()
    N, K = weight.shape
    y = torch.empty(residual.shape, dtype=x.dtype, device=x.device)
    M = y.numel() // N
    if M:
        tile = timed("linear_residual", "fwd", choose(TILES, M, N, x.device, x.dtype), M, N, K, x)
        linear_residual_fwd[grid(tile, M, N)](
            x, weight, weight if bias is None else bias.contiguous(), weight if gamma is None else gamma.contiguous(), residual, y, M, N, K,
            **launch_options(tile, K, x.dtype), HAS_BIAS=bias is not None, HAS_GAMMA=gamma is not None,
        )  # fmt: skip
    return y


def backward_gelu(grad_y: Tensor, weight: Tensor, gamma: Tensor | None, h: Tensor, activation: str) -> Tensor:
    """Gradient of h, [..., k]."""
    grad_y, h = grad_y.contiguous(), h.contiguous()
    weight = weight.contiguous() if gamma is None else gamma[:, None] * weight  # fewer elements than the gradient
    K, N = weight.shape
    dh = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    M = h.numel() // N
    if M:
        tile = timed("linear_residual", "bwd_gelu", choose(BACKWARD_TILES, M, N, h.device, h.dtype), M, N, K, h)
        options = launch_options(tile, K, h.dtype)
        linear_residual_bwd_gelu[grid(tile, M, N)](grad_y, weight.contiguous(), h, dh, M, N, K, **options, ACTIVATION=activation)
    return dh


def compile_cases() -> list[CompileCase]:
    """Both kernels in every tile, with everything fused."""
    fused = {"HAS_BIAS": True, "HAS_GAMMA": True}
    return [
        *cases("linear_residual/fwd", linear_residual_fwd, "x w bias gamma residual y", TILES, fused),
        *cases("linear_residual/bwd_gelu", linear_residual_bwd_gelu, "dy w h dh", BACKWARD_TILES, {"ACTIVATION": "gelu"}),
    ]
