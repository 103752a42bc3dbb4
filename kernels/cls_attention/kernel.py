"""Attention of a few prefix queries in Triton: one program per image and head reads its keys and values once.

    forward    P = softmax(scale q k^T),  out = P v,  row = mean over heads of P[query 0]
    backward   dP = dO v^T + [query 0] drow / H,  delta = sum(P dP),  dS = P (dP - delta),  dq = scale dS k,  dk = scale dS^T q,  dv = P^T dO

With so few queries there is no work for tensor cores: keys and values are multiplied as they come from memory, in float32. Weights are saved by the
forward, float32 [B, H, P, T]: they are small beside the keys, and the row and delta are sums over them. No atomics: a program owns its head's
gradients, and the row is summed over heads by a second kernel.

In the kernels: p_q [B, P, H, D] and p_kv [B, T, 2, H, D] with any strides and 1; p_weights [B, H, P, T]; p_out and p_grad [B, P, H, D].
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuned
from ..compile_case import CompileCase

LOG2E = tl.constexpr(1.4426950408889634)
WIDEST = 128  # elements of a head
MOST_QUERIES = 5  # CLS and four registers; the backward unrolls them
# Tokens BT at a time and warps, by padded width: 8 to 16 elements a thread of each of keys, values and their gradients. Twice as many spill with five
# queries (from the compiler's report, not timed). Up to BT tokens the loops vanish.
TILES = {16: (128, 8), 32: (64, 8), 64: (64, 8), 128: (32, 8)}


@triton.jit
def cls_attention_fwd(
    p_q, p_kv, p_out, p_weights, H, T, scale, s_qb, s_qp, s_qh, s_b, s_t, s_c, s_h,
    P: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, ONE_TILE: tl.constexpr,
):  # fmt: skip
    """Running maximum over the tiles; where there are several, weights are stored as scores first and divided in a second loop."""
    i_b, i_h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    p_k = p_kv + i_b * s_b + i_h * s_h + o_d[None, :]
    for i_p in range(P):
        # [BD]
        b_q = tl.load(p_q + i_b * s_qb + i_p * s_qp + i_h * s_qh + o_d, mask=m_d, other=0.0).to(tl.float32) * (scale * LOG2E)
        b_o = tl.zeros([BD], tl.float32)
        b_m = tl.full([1], float("-inf"), tl.float32)
        b_l = tl.zeros([1], tl.float32)
        p_w = p_weights + ((i_b * H + i_h) * P + i_p) * T
        for i_t in range(0, 1 if ONE_TILE else tl.cdiv(T, BT)):
            o_t = i_t * BT + tl.arange(0, BT)
            m_t = o_t < T
            m_td = m_t[:, None] & m_d[None, :]
            # [BT, BD]
            p_kt = p_k + o_t.to(tl.int64)[:, None] * s_t
            b_k = tl.load(p_kt, mask=m_td, other=0.0).to(tl.float32)
            b_v = tl.load(p_kt + s_c, mask=m_td, other=0.0).to(tl.float32)
            # [BT], in powers of two
            b_s = tl.where(m_t, tl.sum(b_k * b_q[None, :], 1), float("-inf"))
            # [1]
            b_new = tl.maximum(b_m, tl.max(b_s, 0))
            b_shrink = tl.exp2(b_m - b_new)
            # [BT]
            b_p = tl.exp2(b_s - b_new)
            b_l = b_l * b_shrink + tl.sum(b_p, 0)
            # [BD]
            b_o = b_o * b_shrink + tl.sum(b_v * b_p[:, None], 0)
            b_m = b_new
            if ONE_TILE:
                tl.store(p_w + o_t, b_p / b_l, mask=m_t)
            else:
                tl.store(p_w + o_t, b_s, mask=m_t)
        tl.store(p_out + ((i_b * P + i_p) * H + i_h) * D + o_d, (b_o / b_l).to(p_out.dtype.element_ty), mask=m_d)
        if not ONE_TILE:
            tl.debug_barrier()  # another thread may have stored the scores that this one loads
            for i_t in range(0, tl.cdiv(T, BT)):
                o_t = i_t * BT + tl.arange(0, BT)
                b_s = tl.load(p_w + o_t, mask=o_t < T, other=0.0)
                tl.store(p_w + o_t, tl.exp2(b_s - b_m) / b_l, mask=o_t < T)


@triton.jit
def cls_attention_row(p_weights, p_row, H, P, T, BT: tl.constexpr):
    """row [B, T]: mean over heads of the weights of query 0, heads in order."""
    NT = tl.cdiv(T, BT)
    i_t, i_b = tl.program_id(0) % NT, (tl.program_id(0) // NT).to(tl.int64)
    o_t = i_t * BT + tl.arange(0, BT)
    # [BT]
    b_row = tl.zeros([BT], tl.float32)
    for i_h in range(0, H):
        b_row += tl.load(p_weights + (i_b * H + i_h) * P * T + o_t, mask=o_t < T, other=0.0)
    tl.store(p_row + i_b * T + o_t, b_row / H, mask=o_t < T)


@triton.jit
def cls_attention_bwd(
    p_q, p_kv, p_weights, p_grad, p_grad_row, p_dq, p_dkv, H, T, scale, s_qb, s_qp, s_qh, s_b, s_t, s_c, s_h,
    P: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, ONE_TILE: tl.constexpr, HAS_GRAD: tl.constexpr, HAS_ROW: tl.constexpr,
):  # fmt: skip
    """One loop over the tokens for delta of every query, one for all gradients. delta is not taken from dO O: with few tokens dP - delta cancels, and
    only the sum of the very terms from which it is subtracted cancels with them."""
    i_b, i_h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    p_k = p_kv + i_b * s_b + i_h * s_h + o_d[None, :]
    p_dk = p_dkv + (i_b * T * 2 * H + i_h) * D + o_d[None, :]
    p_w = p_weights + (i_b * H + i_h) * P * T
    b_q, b_do, b_dq, b_delta = (), (), (), ()
    for i_p in tl.static_range(P):
        # [BD] each
        b_q += (tl.load(p_q + i_b * s_qb + i_p * s_qp + i_h * s_qh + o_d, mask=m_d, other=0.0).to(tl.float32) * scale,)
        b_dq += (tl.zeros([BD], tl.float32),)
        if HAS_GRAD:
            b_do += (tl.load(p_grad + ((i_b * P + i_p) * H + i_h) * D + o_d, mask=m_d, other=0.0).to(tl.float32),)
        else:
            b_do += (tl.zeros([BD], tl.float32),)
        b_delta += (tl.zeros([1], tl.float32),)

    for i_t in range(0, 1 if ONE_TILE else tl.cdiv(T, BT)):
        o_t = i_t * BT + tl.arange(0, BT)
        m_t = o_t < T
        # [BT, BD]
        b_v = tl.load(p_k + s_c + o_t.to(tl.int64)[:, None] * s_t, mask=m_t[:, None] & m_d[None, :], other=0.0).to(tl.float32)
        new_delta = ()
        for i_p in tl.static_range(P):
            # [BT]
            b_dp = tl.sum(b_v * b_do[i_p][None, :], 1)
            if i_p == 0 and HAS_ROW:
                b_dp += tl.load(p_grad_row + i_b * T + o_t, mask=m_t, other=0.0) / H
            new_delta += (b_delta[i_p] + tl.sum(tl.load(p_w + i_p * T + o_t, mask=m_t, other=0.0) * b_dp, 0),)
        b_delta = new_delta

    for i_t in range(0, 1 if ONE_TILE else tl.cdiv(T, BT)):
        o_t = i_t * BT + tl.arange(0, BT)
        m_t = o_t < T
        m_td = m_t[:, None] & m_d[None, :]
        p_kt = p_k + o_t.to(tl.int64)[:, None] * s_t
        # [BT, BD]
        b_k = tl.load(p_kt, mask=m_td, other=0.0).to(tl.float32)
        b_v = tl.load(p_kt + s_c, mask=m_td, other=0.0).to(tl.float32)
        b_dk = tl.zeros([BT, BD], tl.float32)
        b_dv = tl.zeros([BT, BD], tl.float32)
        new_dq = ()
        for i_p in tl.static_range(P):
            # [BT]
            b_w = tl.load(p_w + i_p * T + o_t, mask=m_t, other=0.0)
            b_dp = tl.sum(b_v * b_do[i_p][None, :], 1)
            if i_p == 0 and HAS_ROW:
                b_dp += tl.load(p_grad_row + i_b * T + o_t, mask=m_t, other=0.0) / H
            b_ds = b_w * (b_dp - b_delta[i_p])
            # [BD]
            new_dq += (b_dq[i_p] + tl.sum(b_ds[:, None] * b_k, 0) * scale,)
            # [BT, BD]
            b_dk += b_ds[:, None] * b_q[i_p][None, :]
            b_dv += b_w[:, None] * b_do[i_p][None, :]
        b_dq = new_dq
        p_dkt = p_dk + o_t.to(tl.int64)[:, None] * (2 * H * D)
        tl.store(p_dkt, b_dk.to(p_dkv.dtype.element_ty), mask=m_td)
        tl.store(p_dkt + H * D, b_dv.to(p_dkv.dtype.element_ty), mask=m_td)
    for i_p in tl.static_range(P):
        tl.store(p_dq + ((i_b * P + i_p) * H + i_h) * D + o_d, b_dq[i_p].to(p_dq.dtype.element_ty), mask=m_d)


def unsupported(function: str, *args) -> str | None:
    """Why these arguments cannot run; None if they can."""
    q = args[0] if function == "forward" else args[2]
    if q.shape[-1] > WIDEST:
        return f"its heads are {q.shape[-1]} wide, {WIDEST} at most fit"
    return f"{q.shape[1]} queries are not few, {MOST_QUERIES} at most: use attention" if q.shape[1] > MOST_QUERIES else None


def strided(q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Both with adjacent elements, and their other strides."""
    q, kv = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, kv))
    return q, kv, (*q.stride()[:3], *kv.stride()[:4])


def tile(kernel: str, q: Tensor, tokens: int) -> tuple[dict, int]:
    """Constants of kernel "fwd" or "bwd" for queries q [B, P, H, D] and so many tokens, and warps."""
    queries, width = q.shape[1], q.shape[3]
    BD = next(w for w in TILES if width <= w)
    BT, warps = tuned.tile("cls_attention", f"{kernel}/d{BD}/{q.itemsize}/{'one' if queries == 1 else 'few'}", TILES[BD], q.device)
    return {"D": width, "BD": BD, "BT": BT, "ONE_TILE": tokens <= BT}, warps


def forward(q: Tensor, kv: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """out, row, weights as in op.py."""
    batch, queries, heads, width = q.shape
    tokens = kv.shape[1]
    q, kv, strides = strided(q, kv)
    out = q.new_empty(batch, queries, heads * width)
    row = q.new_empty(batch, tokens, dtype=torch.float32)
    weights = q.new_empty(batch, heads, queries, tokens, dtype=torch.float32)
    if batch:
        constants, warps = tile("fwd", q, tokens)
        cls_attention_fwd[(batch * heads,)](q, kv, out, weights, heads, tokens, scale, *strides, P=queries, **constants, num_warps=warps)
        BT = min(256, triton.next_power_of_2(tokens))
        cls_attention_row[(batch * triton.cdiv(tokens, BT),)](weights, row, heads, queries, tokens, BT=BT, num_warps=1)
    return out, row, weights


def backward(grad: Tensor | None, grad_row: Tensor | None, q: Tensor, kv: Tensor, weights: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Gradients of q and kv, contiguous; grad or grad_row is None where the loss does not use it."""
    batch, queries, heads, width = q.shape
    tokens = kv.shape[1]
    q, kv, strides = strided(q, kv)
    dq, dkv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, kv))
    if batch:
        grad, grad_row = (None if g is None else g.contiguous() for g in (grad, grad_row))
        constants, warps = tile("bwd", q, tokens)
        cls_attention_bwd[(batch * heads,)](
            q, kv, weights.contiguous(), grad, grad_row, dq, dkv, heads, tokens, scale, *strides,
            P=queries, **constants, HAS_GRAD=grad is not None, HAS_ROW=grad_row is not None, num_warps=warps,
        )  # fmt: skip
    return dq, dkv


def compile_cases() -> list[CompileCase]:
    """Every width in bf16 with one query and with five (four registers beside CLS), in one tile and in several; float32 with one query."""
    cases = []
    for (BD, (BT, warps)), (queries, number) in ((t, c) for t in TILES.items() for c in ((1, "bf16"), (5, "bf16"), (1, "fp32"))):
        tensors = {f"p_{x}": f"*{number}" for x in ("q", "kv", "out", "grad", "dq", "dkv")} | {"p_weights": "*fp32", "p_grad_row": "*fp32"}
        strides = ("s_qb", "s_qp", "s_qh", "s_b", "s_t", "s_c", "s_h")
        types = tensors | dict.fromkeys(("H", "T", *strides), "i32") | {"scale": "fp32"}
        for one in (True, False):
            constants = {"P": queries, "D": BD, "BD": BD, "BT": BT, "ONE_TILE": one}
            name = f"{number}-d{BD}-p{queries}-{'one' if one else 'many'}"
            for kind, kernel, flags in (("fwd", cls_attention_fwd, {}), ("bwd", cls_attention_bwd, {"HAS_GRAD": True, "HAS_ROW": True})):
                known = {k: v for k, v in types.items() if k in kernel.arg_names}
                cases.append(CompileCase(f"cls_attention/{kind}/{name}", kernel, known, constants | flags, warps, aligned=strides))
    types = {"p_weights": "*fp32", "p_row": "*fp32", "H": "i32", "P": "i32", "T": "i32"}
    cases.append(CompileCase("cls_attention/row", cls_attention_row, types, {"BT": 256}, 1))
    return cases
