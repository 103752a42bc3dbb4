"""What the GEMM kernels share: order of the tiles, choice of the tile, activations and their derivatives."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import tuned
from .compile_case import CompileCase
from .hopper import fence_copies
from .tuned import limits

RSQRT_2 = tl.constexpr(0.7071067811865476)
RSQRT_2PI = tl.constexpr(0.3989422804014327)
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)


class Tile(NamedTuple):
    """BM x BN results by steps of BK along the contraction. maxnreg: registers of a thread at most, 0 for what the compiler takes. resident: programs
    that a multiprocessor holds at a time (compile gate)."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int
    maxnreg: int = 0
    resident: int = 1


Table = dict[tuple[int, int], tuple[Tile, ...]]  # by code of `tuned.Limits` and bytes per element, the smallest tile last

# Tiles of GEMMs with a fused epilogue. Every reason comes from sizes and from the compile gate, none from a timing.
# 2 bytes: the largest tile that does not spill, one at which two programs share a multiprocessor (one computes while the other stores), a small one.
# sm_80: 128 x 128 by 4 warps spills. sm_90: 128 x 256 by 8 warps fills the registers, so that nothing runs during its epilogue; 128 x 128 by 4 warps
# leaves room for two programs, which are faster by the model (docs/gpu-model.md). sm_100: 128 x 256 spills; results are in tensor memory, and
# 128 x 128 by 8 warps needs 128 registers, room for two programs; 64 x 64 in steps of 64 spills.
# 4 bytes: exact float32 GEMMs run on the CUDA cores, where larger tiles would spill.
TILES: Table = {
    (80, 2): (Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 4, resident=3)),
    (90, 2): (Tile(128, 128, 64, 4, 3, resident=2), Tile(64, 64, 64, 4, 4, resident=3)),
    (100, 2): (Tile(128, 128, 64, 8, 3, resident=2), Tile(64, 64, 32, 4, 4, resident=6)),
    (80, 4): (Tile(64, 64, 32, 8, 2), Tile(32, 32, 32, 4, 2)),
    (90, 4): (Tile(64, 64, 32, 8, 2), Tile(32, 32, 32, 4, 2)),
    (100, 4): (Tile(64, 64, 32, 8, 2), Tile(32, 32, 32, 4, 2)),
}
GROUP = 8  # rows of tiles that share columns of weights while those are in L2
# Multiply-adds of a multiprocessor in the time of other work, for an H200 by the constants of docs/gpu-model.md.
OPERAND_COST = 88  # one operand from L2
EPILOGUE_COST = 600  # one result, outside of the loop
LATENCY_COST = 3_000_000  # a program's first load


def shared_bytes(tile: Tile, itemsize: int, left: int = 1) -> int:
    """Shared memory that a program takes at most: its operands, as many times as it has stages. left: operands of BM x BK numbers."""
    return tile.stages * (left * tile.BM + tile.BN) * tile.BK * itemsize


def choose(table: Table, M: int, N: int, K: int, device: torch.device, dtype: torch.dtype, left: int = 1) -> Tile:
    """The tile that needs the least time by count, of those that fit into a block: rounds of resident programs, which overlap until multiply-adds or
    operands rule; a program alone waits for its first load, its loop and its epilogue in turn."""
    gpu, tiles = limits(device), table[limits(device).code, dtype.itemsize]

    def cost(tile: Tile) -> float:
        size = tile.BM * tile.BN
        loop = K * max(size, OPERAND_COST * (tile.BM + tile.BN))
        alone = LATENCY_COST + loop + EPILOGUE_COST * size
        rounds, rest = divmod(triton.cdiv(M, tile.BM) * triton.cdiv(N, tile.BN), gpu.processors * tile.resident)
        last = max(triton.cdiv(rest, gpu.processors) * loop, alone) if rest else 0
        return rounds * max(tile.resident * loop, alone) + last

    fitting = [tile for tile in tiles if shared_bytes(tile, dtype.itemsize, left) <= gpu.shared]
    return min(fitting or tiles[-1:], key=cost)  # the last is the smallest


def timed(operation: str, kernel: str, chosen: Tile, M: int, N: int, K: int, x: torch.Tensor) -> Tile:
    """The tile that was timed for this N and K and about this M, where one was on the device of x, else the chosen one."""
    return tuned.tile(operation, f"{kernel}/{N}x{K}/m{triton.next_power_of_2(M)}/{x.itemsize}", chosen, x.device)


def grid(tile: Tile, M: int, N: int) -> tuple[int]:
    return (triton.cdiv(M, tile.BM) * triton.cdiv(N, tile.BN),)


def launch_options(tile: Tile, K: int, dtype: torch.dtype) -> dict:
    """Constants and options that the tile, the contraction's length and the dtype give to a kernel."""
    options = {
        "BM": tile.BM, "BN": tile.BN, "BK": tile.BK, "GROUP": GROUP, "num_warps": tile.warps, "num_stages": tile.stages,
        "EVEN_K": K % tile.BK == 0, "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }  # fmt: skip
    return options | ({"maxnreg": tile.maxnreg} if tile.maxnreg else {})


def cases(name: str, kernel, tensors: str, table: Table, flags: dict) -> list[CompileCase]:
    """Compile cases of a kernel in every tile of a table. tensors: its pointers, without "p_"; flags: its other constants. The contraction is a
    multiple of BK, as in the usual models."""
    found = []
    for (architecture, size), tiles in table.items():
        dtype, kind = (torch.bfloat16, "bf16") if size == 2 else (torch.float32, "fp32")
        types = {f"p_{t}": f"*{kind}" for t in tensors.split()} | {"M": "i32", "N": "i32", "K": "i32"}
        for tile in tiles:
            constants = launch_options(tile, tile.BK, dtype) | flags
            warps, stages, maxnreg = constants.pop("num_warps"), constants.pop("num_stages"), constants.pop("maxnreg", None)
            label = f"{name}/{kind}_{tile.BM}x{tile.BN}x{tile.BK}_for_sm{architecture}"
            found.append(CompileCase(label, kernel, types, constants, warps, stages, ("N", "K"), (architecture,), maxnreg=maxnreg))
    return found


@triton.jit
def tile_position(i_p, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Row and column of tile i_p: GROUP rows of tiles are finished together, so that the weights they share are read from L2."""
    tiles_n = tl.cdiv(N, BN)
    first_m = i_p // (GROUP * tiles_n) * GROUP
    rows = tl.minimum(tl.cdiv(M, BM) - first_m, GROUP)
    within = i_p % (GROUP * tiles_n)
    return first_m + within % rows, within // rows


@triton.jit
def product(
    p_x, p_w, i_m, i_n, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, W_BY_ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tile (i_m, i_n) of x W^T, w: [N, K], if W_BY_ROWS, else of x W, w: [K, N]; x: [M, K]; float32 [BM, BN]. What lies
    beyond the last row or column is arbitrary."""
    o_m, o_n, o_k = tl.minimum(tl.arange(0, BM), M - i_m * BM - 1), tl.arange(0, BN), tl.arange(0, BK)
    p_xt = p_x + i_m.to(tl.int64) * BM * K + (o_m[:, None] * K + o_k[None, :])
    if W_BY_ROWS:
        p_wt, step = p_w + i_n.to(tl.int64) * BN * K + (tl.minimum(o_n, N - i_n * BN - 1)[None, :] * K + o_k[:, None]), BK
    else:  # columns are adjacent here: a mask, because a minimum would hide that from the compiler and narrow the loads
        p_wt, step = p_w + i_n * BN + (o_k[:, None] * N + o_n[None, :]), BK * N
        m_n = (i_n * BN + o_n < N)[None, :]
    # [BM, BN]
    b_sum = tl.zeros([BM, BN], dtype=tl.float32)
    for i_k in range(0, tl.cdiv(K, BK)):
        # [BM, BK], [BK, BN]
        m_k = o_k < K - i_k * BK
        b_x = tl.load(p_xt) if EVEN_K else tl.load(p_xt, mask=m_k[None, :], other=0.0)
        if W_BY_ROWS:
            b_w = tl.load(p_wt) if EVEN_K else tl.load(p_wt, mask=m_k[:, None], other=0.0)
        else:
            b_w = tl.load(p_wt, mask=m_n if EVEN_K else m_n & m_k[:, None], other=0.0)
        fence_copies(b_w)
        b_sum = tl.dot(b_x, b_w, b_sum, input_precision=PRECISION)
        p_xt += BK
        p_wt += step
    return b_sum


@triton.jit
def halves(b, BM: tl.constexpr, BN: tl.constexpr):
    """Left and right columns of [BM, BN]: an epilogue that takes one after the other needs fewer registers."""
    return tl.split(tl.permute(tl.reshape(b, [BM, 2, BN // 2]), [0, 2, 1]))


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def normal_cdf(b_h):
    """Phi(h), absolute error below 1e-7, and exp(-h^2 / 2), the one exponential both it and the density need: Abramowitz and Stegun 7.1.26,
    1 - erf(z) = t (a1 + t (a2 + ...)) exp(-z^2), at z = |h| / sqrt 2, where the density's exponent is the same."""
    b_e = tl.exp(-0.5 * b_h * b_h)
    b_t = 1.0 / (1.0 + 0.3275911 * RSQRT_2 * tl.abs(b_h))
    b_tail = 0.5 * b_e * b_t * (0.254829592 + b_t * (-0.284496736 + b_t * (1.421413741 + b_t * (-1.453152027 + b_t * 1.061405429))))
    return tl.where(b_h < 0, b_tail, 1.0 - b_tail), b_e


@triton.jit
def activate(b_h, ACTIVATION: tl.constexpr):
    """f(h) and f'(h) in float32, which share their exponential; formulas in linear_gelu/reference.py, derived in linear_gelu/README.md."""
    if ACTIVATION == "gelu":
        b_cdf, b_e = normal_cdf(b_h)
        return b_h * b_cdf, b_cdf + b_h * b_e * RSQRT_2PI
    if ACTIVATION == "gelu_tanh":
        b_s = sigmoid(2.0 * SQRT_2_OVER_PI * (b_h + 0.044715 * b_h * b_h * b_h))
        return b_h * b_s, b_s + b_h * b_s * (1.0 - b_s) * 2.0 * SQRT_2_OVER_PI * (1.0 + 3.0 * 0.044715 * b_h * b_h)
    b_s = sigmoid(1.702 * b_h)
    return b_h * b_s, b_s + 1.702 * b_h * b_s * (1.0 - b_s)
