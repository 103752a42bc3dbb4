"""layer_norm in Triton: one pass over the rows forward, one backward; s, mean and rstd are saved for backward.

    forward    s = x + residual,  mean = sum(s) / d,  rstd = (sum((s - mean)^2) / d + eps)^-1/2,  y = (s - mean) rstd weight + bias
    backward   g = grad_y weight,  n = (s - mean) rstd,  grad = rstd (g - sum(g) / d - n sum(g n) / d) + grad_s

Sums are over the d numbers of a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuned
from ..compile_case import CompileCase

# A program takes whole rows: BD columns, d rounded up to a power of two. Rows BR per program and warps, by BD: about 2048 elements per 4 warps
# give every thread one or more 16-byte loads in bf16 and keep the forward's float32 row in registers (derived, not timed).
TILES = {64: (16, 4), 128: (16, 4), 256: (8, 4), 512: (4, 4), 1024: (2, 4), 2048: (1, 4), 4096: (1, 8), 8192: (1, 16)}


@triton.jit
def layer_norm_fwd(
    p_x, p_residual, p_weight, p_bias, p_y, p_s, p_mean, p_rstd, rows, d, eps,
    BR: tl.constexpr, BD: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """x, residual, y, s: [rows, d], contiguous; weight, bias: [d]; mean, rstd: [rows]."""
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_d = tl.arange(0, BD)
    m_r, m_d = o_r < rows, o_d < d
    m = m_r[:, None] & m_d[None, :]
    o = o_r[:, None] * d + o_d[None, :]
    # [BR, BD]
    b_s = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        b_s += tl.load(p_residual + o, mask=m, other=0.0).to(tl.float32)
        tl.store(p_s + o, b_s.to(p_s.dtype.element_ty), mask=m)
    # [BR]
    b_mean = tl.sum(b_s, 1) / d
    # [BR, BD]
    b_c = tl.where(m_d[None, :], b_s - b_mean[:, None], 0.0)
    # [BR]
    b_rstd = 1.0 / tl.sqrt(tl.sum(b_c * b_c, 1) / d + eps)
    # [BD]
    b_w = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    # [BR, BD]
    b_y = b_c * b_rstd[:, None] * b_w[None, :]
    if HAS_BIAS:
        b_y += tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    tl.store(p_y + o, b_y.to(p_y.dtype.element_ty), mask=m)
    tl.store(p_mean + o_r, b_mean, mask=m_r)
    tl.store(p_rstd + o_r, b_rstd, mask=m_r)


@triton.jit
def layer_norm_bwd(
    p_dy, p_ds, p_s, p_weight, p_mean, p_rstd, p_dx, rows, d,
    BR: tl.constexpr, BD: tl.constexpr, HAS_DS: tl.constexpr,
):  # fmt: skip
    """dy, ds, s, dx: [rows, d], contiguous; weight: [d]; mean, rstd: [rows]."""
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_d = tl.arange(0, BD)
    m_r, m_d = o_r < rows, o_d < d
    m = m_r[:, None] & m_d[None, :]
    o = o_r[:, None] * d + o_d[None, :]
    # [BR]
    b_mean = tl.load(p_mean + o_r, mask=m_r, other=0.0)
    b_rstd = tl.load(p_rstd + o_r, mask=m_r, other=0.0)
    # [BD]
    b_w = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    # [BR, BD]
    b_n = (tl.load(p_s + o, mask=m, other=0.0).to(tl.float32) - b_mean[:, None]) * b_rstd[:, None]
    b_g = tl.load(p_dy + o, mask=m, other=0.0).to(tl.float32) * b_w[None, :]
    b_dx = b_rstd[:, None] * (b_g - (tl.sum(b_g, 1) / d)[:, None] - b_n * (tl.sum(b_g * b_n, 1) / d)[:, None])
    if HAS_DS:
        b_dx += tl.load(p_ds + o, mask=m, other=0.0).to(tl.float32)
    tl.store(p_dx + o, b_dx.to(p_dx.dtype.element_ty), mask=m)


def unsupported(function: str, *args) -> str | None:
    """Why these arguments cannot run; None if they can."""
    d = args[0].shape[-1]
    return f"its rows have {d} columns, {max(TILES)} at most fit" if d > max(TILES) else None


def tile(kernel: str, d: int, x: Tensor) -> tuple[int, int, int]:
    """BD, BR and warps of kernel "fwd" or "bwd" for rows of d columns of numbers like x."""
    columns = max(min(TILES), triton.next_power_of_2(d))
    return columns, *tuned.tile("layer_norm", f"{kernel}/d{columns}/{x.itemsize}", TILES[columns], x.device)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, s, mean, rstd as in op.py."""
    d = x.shape[-1]
    rows = x.numel() // d
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    s = y.new_empty(0) if residual is None else torch.empty_like(y)
    mean = y.new_empty(x.shape[:-1], dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if rows:
        BD, BR, warps = tile("fwd", d, x)
        x, weight = x.contiguous(), weight.contiguous()
        residual, bias = None if residual is None else residual.contiguous(), None if bias is None else bias.contiguous()
        layer_norm_fwd[(triton.cdiv(rows, BR),)](
            x, x if residual is None else residual, weight, weight if bias is None else bias, y, y if residual is None else s, mean, rstd,
            rows, d, eps,
            BR=BR, BD=BD, HAS_RESIDUAL=residual is not None, HAS_BIAS=bias is not None, num_warps=warps,
        )  # fmt: skip
    return y, s, mean, rstd


def backward(grad_y: Tensor, grad_s: Tensor | None, s: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, eps: float) -> Tensor:
    """Gradient of s, [..., d]."""
    d = s.shape[-1]
    rows = s.numel() // d
    dx = torch.empty(s.shape, dtype=s.dtype, device=s.device)
    if rows:
        BD, BR, warps = tile("bwd", d, s)
        grad_y, s, weight = grad_y.contiguous(), s.contiguous(), weight.contiguous()
        grad_s = None if grad_s is None else grad_s.contiguous()
        layer_norm_bwd[(triton.cdiv(rows, BR),)](
            grad_y, grad_y if grad_s is None else grad_s, s, weight, mean, rstd, dx, rows, d,
            BR=BR, BD=BD, HAS_DS=grad_s is not None, num_warps=warps,
        )  # fmt: skip
    return dx


def compile_cases() -> list[CompileCase]:
    """Both kernels in every tile, bf16, with everything fused."""
    cases = []
    for BD, (BR, warps) in TILES.items():
        size = {"BR": BR, "BD": BD}
        tensors = {f"p_{name}": "*bf16" for name in ("x", "residual", "weight", "bias", "y", "s")}
        types = tensors | {"p_mean": "*fp32", "p_rstd": "*fp32", "rows": "i32", "d": "i32", "eps": "fp32"}
        flags = {"HAS_RESIDUAL": True, "HAS_BIAS": True}
        cases.append(CompileCase(f"layer_norm/fwd/d{BD}", layer_norm_fwd, types, size | flags, warps, aligned=("d",)))
        tensors = {f"p_{name}": "*bf16" for name in ("dy", "ds", "s", "weight")}
        types = tensors | {"p_mean": "*fp32", "p_rstd": "*fp32", "p_dx": "*bf16", "rows": "i32", "d": "i32"}
        cases.append(CompileCase(f"layer_norm/bwd/d{BD}", layer_norm_bwd, types, size | {"HAS_DS": True}, warps, aligned=("d",)))
    return cases
