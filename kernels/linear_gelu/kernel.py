"""linear_gelu in Triton: the activation in the GEMM's epilogue, its derivative before the gradient's GEMM.

    forward    h = x W^T + b,  y = f(h)            f'(h) is saved in x's dtype; both are made from the float32 accumulator
    backward   dx = (dy f'(h)) W                   dy f'(h) exists in registers only

f is the activation, W the frozen weight.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compile_case import CompileCase
from ..hopper import fence_copies, settled
from ..matmul import TILES, Table, Tile, activate, cases, choose, grid, halves, launch_options, product, tile_position, timed

# sm_90: with 128 registers a thread the epilogue does not spill, and two programs share a multiprocessor: one multiplies while the other computes and
# stores f and f'.
FORWARD_TILES: Table = TILES | {(90, 2): (Tile(128, 128, 64, 8, 3, maxnreg=128, resident=2), Tile(64, 64, 64, 4, 4, resident=3))}
# The left operand is made in registers, a BM x BK tile: steps of 32 instead of 64, or it spills (compile gate); 4 bytes as in TILES.
BACKWARD_TILES: Table = TILES | {
    (80, 2): (Tile(128, 128, 32, 8, 3), Tile(64, 64, 32, 8, 3)),
    (90, 2): (Tile(128, 256, 32, 8, 3), Tile(128, 128, 64, 8, 3), Tile(64, 64, 32, 4, 4)),
    (100, 2): (Tile(128, 256, 32, 8, 3), Tile(128, 128, 32, 8, 4), Tile(64, 64, 32, 4, 4)),
}


@triton.jit
def linear_gelu_fwd(
    p_x, p_w, p_bias, p_y, p_slope, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, STORE_SLOPE: tl.constexpr,
):  # fmt: skip
    """x: [M, K]; w: [N, K]; bias: [N]; y, slope: [M, N]; all contiguous."""
    i_m, i_n = tile_position(tl.program_id(0), M, N, BM, BN, GROUP)
    b_left, b_right = halves(product(p_x, p_w, i_m, i_n, M, N, K, BM, BN, BK, EVEN_K, True, PRECISION), BM, BN)
    o_m = tl.arange(0, BM)
    first = i_m.to(tl.int64) * BM * N
    for half in tl.static_range(2):
        o_n = i_n * BN + half * (BN // 2) + tl.arange(0, BN // 2)
        # [BM, BN / 2]
        b_h = b_left if half == 0 else b_right
        if HAS_BIAS:
            b_h += tl.load(p_bias + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
        o = o_m[:, None] * N + o_n[None, :]
        m = (o_m < M - i_m * BM)[:, None] & (o_n < N)[None, :]
        b_y, b_slope = activate(b_h, ACTIVATION)
        if STORE_SLOPE:
            tl.store(p_slope + first + o, b_slope.to(p_slope.dtype.element_ty), mask=m)
        tl.store(p_y + first + o, b_y.to(p_y.dtype.element_ty), mask=m)


@triton.jit
def linear_gelu_bwd(
    p_dy, p_slope, p_w, p_dx, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dy, slope: [M, K]; w: [K, N]; dx: [M, N]; all contiguous; K is the contraction, the layer's output width."""
    i_m, i_n = tile_position(tl.program_id(0), M, N, BM, BN, GROUP)
    o_m, o_n, o_k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    last_m = M - i_m * BM - 1  # rows beyond it repeat it and are not stored
    first = i_m.to(tl.int64) * BM
    o = tl.minimum(o_m, last_m)[:, None] * K + o_k[None, :]
    m_n = (i_n * BN + o_n < N)[None, :]
    p_dyt, p_st = p_dy + first * K + o, p_slope + first * K + o
    p_wt = p_w + i_n * BN + (o_k[:, None] * N + o_n[None, :])
    # [BM, BN]
    b_dx = tl.zeros([BM, BN], dtype=tl.float32)
    for i_k in range(0, tl.cdiv(K, BK)):
        # [BM, BK], [BM, BK], [BK, BN]
        if EVEN_K:
            b_dy, b_s, b_w = tl.load(p_dyt), tl.load(p_st), tl.load(p_wt, mask=m_n, other=0.0)
        else:
            m_k = o_k < K - i_k * BK
            b_dy, b_s = tl.load(p_dyt, mask=m_k[None, :], other=0.0), tl.load(p_st, mask=m_k[None, :], other=0.0)
            b_w = tl.load(p_wt, mask=m_n & m_k[:, None], other=0.0)
        # [BM, BK]
        b_dh = (b_dy.to(tl.float32) * b_s.to(tl.float32)).to(b_w.dtype)
        fence_copies(b_w)
        b_dx = settled(tl.dot(b_dh, b_w, b_dx, input_precision=PRECISION), b_w)
        p_dyt += BK
        p_st += BK
        p_wt += BK * N
    m = (o_m <= last_m)[:, None] & m_n
    tl.store(p_dx + first * N + i_n * BN + (o_m[:, None] * N + o_n[None, :]), b_dx.to(p_dx.dtype.element_ty), mask=m)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, keep: bool) -> tuple[Tensor, Tensor]:
    """y and f'(h) as in op.py."""
    x, weight, bias = x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous()
    N, K = weight.shape
    y = torch.empty(*x.shape[:-1], N, dtype=x.dtype, device=x.device)
    slope = torch.empty_like(y) if keep else y.new_empty(0)
    M = y.numel() // N
    if M:
        tile = timed("linear_gelu", "fwd", choose(FORWARD_TILES, M, N, K, x.device, x.dtype), M, N, K, x)
        linear_gelu_fwd[grid(tile, M, N)](
            x, weight, weight if bias is None else bias, y, slope if keep else y, M, N, K, **launch_options(tile, K, x.dtype),
            ACTIVATION=activation, HAS_BIAS=bias is not None, STORE_SLOPE=keep,
        )  # fmt: skip
    return y, slope


def backward(grad_y: Tensor, slope: Tensor, weight: Tensor) -> Tensor:
    """Gradient of x, [..., k]."""
    grad_y, slope, weight = grad_y.contiguous(), slope.contiguous(), weight.contiguous()
    K, N = weight.shape
    dx = torch.empty(*slope.shape[:-1], N, dtype=slope.dtype, device=slope.device)
    M = slope.numel() // K
    if M:
        tile = timed("linear_gelu", "bwd", choose(BACKWARD_TILES, M, N, K, slope.device, slope.dtype, left=2), M, N, K, slope)
        linear_gelu_bwd[grid(tile, M, N)](grad_y, slope, weight, dx, M, N, K, **launch_options(tile, K, slope.dtype))
    return dx


def compile_cases() -> list[CompileCase]:
    """Both kernels in every tile, exact GELU."""
    flags = {"ACTIVATION": "gelu", "HAS_BIAS": True, "STORE_SLOPE": True}
    return [
        *cases("linear_gelu/fwd", linear_gelu_fwd, "x w bias y slope", FORWARD_TILES, flags),
        *cases("linear_gelu/bwd", linear_gelu_bwd, "dy slope w dx", BACKWARD_TILES, {}),
    ]
