"""Attention in Triton: a forward kernel, a backward in one pass where a head fits on the chip, a backward in two kernels beyond.

All read packed qkv where it lies, through its strides and, with an index, through the rows it names; nothing is gathered in memory. No kernel adds
to memory that another program writes: there are no atomics, and results repeat bit for bit. README.md derives the equations.

In every kernel: p_qkv [B, L, 3, H, D], any strides s_b, s_t, s_c, s_h (image, token, part, head) and 1; p_index [B, n]; p_lengths [B]; p_out and
p_grad [B, n, H, D]; p_lse and p_delta float32 [B, H, n]; p_dqkv [B, L, 3, H, D]. BD is D rounded up to a power of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compile_case import CompileCase
from ..hopper import fence_copies
from . import tiles

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def row_offsets(p_index, i_b, n, o_t, m_t, s_t, USE_INDEX: tl.constexpr):
    """Where tokens o_t of image i_b start, in elements from the image's first row: int64 [BT]."""
    if USE_INDEX:
        # [BT]
        o_t = tl.load(p_index + i_b * n + o_t, mask=m_t, other=0)
    return o_t.to(tl.int64) * s_t


@triton.jit
def real_tokens(p_lengths, i_b, n, USE_LENGTHS: tl.constexpr):
    """How many tokens of image i_b are real."""
    if USE_LENGTHS:
        n = tl.minimum(tl.load(p_lengths + i_b).to(tl.int32), n)
    return n


@triton.jit
def attention_fwd(
    p_qkv, p_index, p_lengths, p_out, p_lse, H, n, scale, s_b, s_t, s_c, s_h,
    D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, ONE_TILE: tl.constexpr,
    USE_INDEX: tl.constexpr, USE_LENGTHS: tl.constexpr,
):  # fmt: skip
    """One program: BT queries of one head against all keys, BS at a time, with a running maximum."""
    NT = tl.cdiv(n, BT)
    i_t, i_bh = tl.program_id(0) % NT, tl.program_id(0) // NT
    i_b, i_h = (i_bh // H).to(tl.int64), i_bh % H
    end = real_tokens(p_lengths, i_b, n, USE_LENGTHS)
    if i_t * BT >= end:
        return

    o_d = tl.arange(0, BD)
    m_d = o_d < D
    o_t = i_t * BT + tl.arange(0, BT)
    m_t = o_t < end
    p_q = p_qkv + i_b * s_b + i_h * s_h + o_d[None, :]
    # [BT, BD]
    b_q = tl.load(p_q + row_offsets(p_index, i_b, n, o_t, m_t, s_t, USE_INDEX)[:, None], mask=m_t[:, None] & m_d[None, :], other=0.0)
    # [BT]
    b_m = tl.full([BT], float("-inf"), tl.float32)
    b_l = tl.zeros([BT], tl.float32)
    # [BT, BD]
    b_o = tl.zeros([BT, BD], tl.float32)
    for i_s in range(0, 1 if ONE_TILE else tl.cdiv(end, BS)):
        o_s = i_s * BS + tl.arange(0, BS)
        m_s = o_s < end
        p_k = p_q + s_c + row_offsets(p_index, i_b, n, o_s, m_s, s_t, USE_INDEX)[:, None]
        # [BS, BD]
        b_k = tl.load(p_k, mask=m_s[:, None] & m_d[None, :], other=0.0)
        b_v = tl.load(p_k + s_c, mask=m_s[:, None] & m_d[None, :], other=0.0)
        if not ONE_TILE:
            fence_copies(b_k)
        # [BT, BS], in powers of two
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * (scale * LOG2E)
        b_s = tl.where(m_s[None, :], b_s, float("-inf"))
        # [BT]
        b_new = tl.maximum(b_m, tl.max(b_s, 1))
        b_shrink = tl.exp2(b_m - b_new)
        # [BT, BS]
        b_p = tl.exp2(b_s - b_new[:, None])
        b_l = b_l * b_shrink + tl.sum(b_p, 1)
        b_o = b_o * b_shrink[:, None]
        if not ONE_TILE:
            fence_copies(b_v)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o, input_precision="ieee")
        b_m = b_new

    p_o = p_out + ((i_b * n + o_t) * H + i_h)[:, None] * D + o_d[None, :]
    tl.store(p_o, (b_o / b_l[:, None]).to(p_out.dtype.element_ty), mask=m_t[:, None] & m_d[None, :])
    tl.store(p_lse + (i_b * H + i_h) * n + o_t, (b_m + tl.log2(b_l)) / LOG2E, mask=m_t)


@triton.jit
def weights_and_gradient(b_q, b_do, b_k, b_v, b_lse, m_s, scale):
    """P^T and dP^T of one tile, float32 [BS, BT]: keys are rows, so that dV and dK take them from registers as they lie. b_lse and
    scale are those of powers of two."""
    # [BS, BT]
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * scale
    b_p = tl.where(m_s[:, None], tl.exp2(b_s - b_lse[None, :]), 0.0)
    return b_p, tl.dot(b_v, tl.trans(b_do), input_precision="ieee")


@triton.jit
def attention_bwd(
    p_qkv, p_index, p_lengths, p_lse, p_grad, p_dqkv, H, n, L, scale, s_b, s_t, s_c, s_h,
    D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BE: tl.constexpr, NS: tl.constexpr, ONE_TILE: tl.constexpr,
    USE_INDEX: tl.constexpr, USE_LENGTHS: tl.constexpr,
):  # fmt: skip
    """One program: dq, dk and dv of one head. All keys and values stay on the chip, in NS tiles of BS rows, the last of BE; BT queries at a time pass
    by and meet every key, so delta = sum(P dP) needs no output of the forward and dq is complete at once."""
    OWN_SUM: tl.constexpr = p_qkv.dtype.element_ty == tl.float32  # P / sum(P): lse is rounded, which 16 bits do not show
    i_bh = tl.program_id(0)
    i_b, i_h = (i_bh // H).to(tl.int64), i_bh % H
    end = real_tokens(p_lengths, i_b, n, USE_LENGTHS)
    log2e = tl.where(end > 1, LOG2E, 0.0)  # a token alone has the weight one, whatever its score is rounded to

    o_d = tl.arange(0, BD)
    m_d = o_d < D
    p_q = p_qkv + i_b * s_b + i_h * s_h + o_d[None, :]
    p_dq = p_dqkv + (i_b * L * 3 * H + i_h) * D + o_d[None, :]
    p_do = p_grad + (i_b * n * H + i_h) * D + o_d[None, :]
    b_k, b_v, b_dk, b_dv = (), (), (), ()
    for j in tl.static_range(NS):
        o_s = j * BS + tl.arange(0, BS if j < NS - 1 else BE)
        m_s = o_s < end
        p_k = p_q + s_c + row_offsets(p_index, i_b, n, o_s, m_s, s_t, USE_INDEX)[:, None]
        # [BS, BD] each
        b_k += (tl.load(p_k, mask=m_s[:, None] & m_d[None, :], other=0.0),)
        b_v += (tl.load(p_k + s_c, mask=m_s[:, None] & m_d[None, :], other=0.0),)
        b_dk += (tl.zeros([BS if j < NS - 1 else BE, BD], tl.float32),)
        b_dv += (tl.zeros([BS if j < NS - 1 else BE, BD], tl.float32),)

    for i_t in range(0, 1 if ONE_TILE else tl.cdiv(end, BT)):
        o_t = i_t * BT + tl.arange(0, BT)
        m_t = o_t < end
        m_td = m_t[:, None] & m_d[None, :]
        o_r = row_offsets(p_index, i_b, n, o_t, m_t, 1, USE_INDEX)
        # [BT, BD]
        b_q = tl.load(p_q + (o_r * s_t)[:, None], mask=m_td, other=0.0)
        b_do = tl.load(p_do + o_t[:, None] * (H * D), mask=m_td, other=0.0)
        if not ONE_TILE:
            fence_copies(b_q)
        # [BT]; a query past the end has weights, but no gradient to weigh
        b_lse = tl.load(p_lse + (i_b * H + i_h) * n + o_t, mask=m_t, other=0.0) * log2e
        b_l = tl.zeros([BT], tl.float32)
        b_delta = tl.zeros([BT], tl.float32)
        b_p, b_dp = (), ()
        for j in tl.static_range(NS):
            m_s = j * BS + tl.arange(0, BS if j < NS - 1 else BE) < end
            # [BS, BT]
            b_p_j, b_dp_j = weights_and_gradient(b_q, b_do, b_k[j], b_v[j], b_lse, m_s, scale * log2e)
            b_l += tl.sum(b_p_j, 0)
            b_delta += tl.sum(b_p_j * b_dp_j, 0)
            b_p += (b_p_j,)
            b_dp += (b_dp_j,)
        if OWN_SUM:
            b_p_old, b_p = b_p, ()
            for j in tl.static_range(NS):
                b_p += (b_p_old[j] / b_l[None, :],)
            b_delta /= b_l
        # [BT, BD]
        b_dq = tl.zeros([BT, BD], tl.float32)
        b_dk_old, b_dv_old = b_dk, b_dv
        b_dk, b_dv = (), ()
        for j in tl.static_range(NS):
            # [BS, BT]
            b_ds = (b_p[j] * (b_dp[j] - b_delta[None, :])).to(b_q.dtype)
            # [BS, BD]
            b_dv += (tl.dot(b_p[j].to(b_q.dtype), b_do, b_dv_old[j], input_precision="ieee"),)
            b_dk += (tl.dot(b_ds, b_q, b_dk_old[j], input_precision="ieee"),)
            # [BT, BD]
            b_dq = tl.dot(tl.trans(b_ds), b_k[j], b_dq, input_precision="ieee")
        p_dq_t = p_dq + (o_r * (3 * H * D))[:, None]
        tl.store(p_dq_t, (b_dq * scale).to(p_dqkv.dtype.element_ty), mask=m_td)

    for j in tl.static_range(NS):
        o_s = j * BS + tl.arange(0, BS if j < NS - 1 else BE)
        m_s = o_s < end
        p_dk = p_dq + H * D + row_offsets(p_index, i_b, n, o_s, m_s, 3 * H * D, USE_INDEX)[:, None]
        tl.store(p_dk, (b_dk[j] * scale).to(p_dqkv.dtype.element_ty), mask=m_s[:, None] & m_d[None, :])
        tl.store(p_dk + H * D, b_dv[j].to(p_dqkv.dtype.element_ty), mask=m_s[:, None] & m_d[None, :])


@triton.jit
def attention_bwd_queries(
    p_qkv, p_index, p_lengths, p_out, p_lse, p_grad, p_dqkv, p_delta, H, n, L, scale, s_b, s_t, s_c, s_h,
    D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, USE_INDEX: tl.constexpr, USE_LENGTHS: tl.constexpr,
):  # fmt: skip
    """First kernel of the pair. One program: dq of BT queries of one head, and their delta = sum(dO O), which the second kernel reads."""
    NT = tl.cdiv(n, BT)
    i_t, i_bh = tl.program_id(0) % NT, tl.program_id(0) // NT
    i_b, i_h = (i_bh // H).to(tl.int64), i_bh % H
    end = real_tokens(p_lengths, i_b, n, USE_LENGTHS)
    if i_t * BT >= end:
        return

    o_d = tl.arange(0, BD)
    m_d = o_d < D
    o_t = i_t * BT + tl.arange(0, BT)
    m_t = o_t < end
    m_td = m_t[:, None] & m_d[None, :]
    p_q = p_qkv + i_b * s_b + i_h * s_h + o_d[None, :]
    o_o = ((i_b * n + o_t) * H + i_h)[:, None] * D + o_d[None, :]
    # [BT, BD]
    b_q = tl.load(p_q + row_offsets(p_index, i_b, n, o_t, m_t, s_t, USE_INDEX)[:, None], mask=m_td, other=0.0)
    b_do = tl.load(p_grad + o_o, mask=m_td, other=0.0)
    b_o = tl.load(p_out + o_o, mask=m_td, other=0.0)
    # [BT]
    b_lse = tl.load(p_lse + (i_b * H + i_h) * n + o_t, mask=m_t, other=float("inf")) * LOG2E
    b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)
    tl.store(p_delta + (i_b * H + i_h) * n + o_t, b_delta, mask=m_t)
    # [BT, BD]
    b_dq = tl.zeros([BT, BD], tl.float32)
    for i_s in range(0, tl.cdiv(end, BS)):
        o_s = i_s * BS + tl.arange(0, BS)
        m_s = o_s < end
        p_k = p_q + s_c + row_offsets(p_index, i_b, n, o_s, m_s, s_t, USE_INDEX)[:, None]
        # [BS, BD]
        b_k = tl.load(p_k, mask=m_s[:, None] & m_d[None, :], other=0.0)
        b_v = tl.load(p_k + s_c, mask=m_s[:, None] & m_d[None, :], other=0.0)
        fence_copies(b_k)
        # [BT, BS]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * (scale * LOG2E)
        b_p = tl.where(m_s[None, :], tl.exp2(b_s - b_lse[:, None]), 0.0)
        b_ds = b_p * (tl.dot(b_do, tl.trans(b_v), input_precision="ieee") - b_delta[:, None])
        # [BT, BD]
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")

    p_dq = p_dqkv + (i_b * L * 3 * H + i_h) * D + row_offsets(p_index, i_b, n, o_t, m_t, 3 * H * D, USE_INDEX)[:, None] + o_d[None, :]
    tl.store(p_dq, (b_dq * scale).to(p_dqkv.dtype.element_ty), mask=m_td)


@triton.jit
def attention_bwd_keys(
    p_qkv, p_index, p_lengths, p_lse, p_grad, p_dqkv, p_delta, H, n, L, scale, s_b, s_t, s_c, s_h,
    D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, USE_INDEX: tl.constexpr, USE_LENGTHS: tl.constexpr,
):  # fmt: skip
    """Second kernel of the pair. One program: dk and dv of BS keys of one head, over all queries."""
    NS = tl.cdiv(n, BS)
    i_s, i_bh = tl.program_id(0) % NS, tl.program_id(0) // NS
    i_b, i_h = (i_bh // H).to(tl.int64), i_bh % H
    end = real_tokens(p_lengths, i_b, n, USE_LENGTHS)
    if i_s * BS >= end:
        return

    o_d = tl.arange(0, BD)
    m_d = o_d < D
    o_s = i_s * BS + tl.arange(0, BS)
    m_s = o_s < end
    m_sd = m_s[:, None] & m_d[None, :]
    p_q = p_qkv + i_b * s_b + i_h * s_h + o_d[None, :]
    p_k = p_q + s_c + row_offsets(p_index, i_b, n, o_s, m_s, s_t, USE_INDEX)[:, None]
    # [BS, BD]
    b_k = tl.load(p_k, mask=m_sd, other=0.0)
    b_v = tl.load(p_k + s_c, mask=m_sd, other=0.0)
    b_dk = tl.zeros([BS, BD], tl.float32)
    b_dv = tl.zeros([BS, BD], tl.float32)
    for i_t in range(0, tl.cdiv(end, BT)):
        o_t = i_t * BT + tl.arange(0, BT)
        m_t = o_t < end
        # [BT, BD]
        b_q = tl.load(p_q + row_offsets(p_index, i_b, n, o_t, m_t, s_t, USE_INDEX)[:, None], mask=m_t[:, None] & m_d[None, :], other=0.0)
        b_do = tl.load(p_grad + ((i_b * n + o_t) * H + i_h)[:, None] * D + o_d[None, :], mask=m_t[:, None] & m_d[None, :], other=0.0)
        # [BT]
        b_lse = tl.load(p_lse + (i_b * H + i_h) * n + o_t, mask=m_t, other=float("inf")) * LOG2E
        b_delta = tl.load(p_delta + (i_b * H + i_h) * n + o_t, mask=m_t, other=0.0)
        fence_copies(b_q)
        # [BS, BT]
        b_p, b_dp = weights_and_gradient(b_q, b_do, b_k, b_v, b_lse, m_s, scale * LOG2E)
        b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q.dtype)
        # [BS, BD]
        b_dv = tl.dot(b_p.to(b_q.dtype), b_do, b_dv, input_precision="ieee")
        b_dk = tl.dot(b_ds, b_q, b_dk, input_precision="ieee")

    p_dk = p_dqkv + ((i_b * L * 3 + 1) * H + i_h) * D + row_offsets(p_index, i_b, n, o_s, m_s, 3 * H * D, USE_INDEX)[:, None] + o_d[None, :]
    tl.store(p_dk, (b_dk * scale).to(p_dqkv.dtype.element_ty), mask=m_sd)
    tl.store(p_dk + H * D, b_dv.to(p_dqkv.dtype.element_ty), mask=m_sd)


# ---- launchers


def unsupported(function: str, *args) -> str | None:
    """Why these arguments cannot run; None if they can."""
    width = args[0 if function == "forward" else 1].shape[-1]
    return f"its heads are {width} wide, {tiles.WIDEST} at most fit" if width > tiles.WIDEST else None


def last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def shared_arguments(index: Tensor | None, lengths: Tensor | None, width: int) -> dict:
    """Constants that all kernels take."""
    return {"D": width, "BD": tiles.padded_width(width), "USE_INDEX": index is not None, "USE_LENGTHS": lengths is not None}


def forward(qkv: Tensor, index: Tensor | None, lengths: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """out and lse as in op.py; where there are lengths, rows past them are zero in out and zero in lse."""
    qkv, index = last_contiguous(qkv), None if index is None else index.contiguous()
    batch, n, _, heads, width = qkv.shape
    n = n if index is None else index.shape[1]
    new = qkv.new_empty if lengths is None else qkv.new_zeros  # kernels write no row past a length
    out, lse = new(batch, n, heads * width), new(batch, heads, n, dtype=torch.float32)
    if batch:
        tile = tiles.forward(n, width, qkv)
        attention_fwd[(triton.cdiv(n, tile.BT) * batch * heads,)](
            qkv, index, lengths, out, lse, heads, n, scale, *qkv.stride()[:4],
            BT=tile.BT, BS=tile.BS, ONE_TILE=n <= tile.BS, **shared_arguments(index, lengths, width),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out, lse


def backward(grad: Tensor, qkv: Tensor, index: Tensor | None, lengths: Tensor | None, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    """Gradient of qkv, contiguous. out is read only by the pair of kernels for long sequences."""
    qkv, grad, out, lse = last_contiguous(qkv), grad.contiguous(), out.contiguous(), lse.contiguous()
    index = None if index is None else index.contiguous()
    batch, rows, _, heads, width = qkv.shape
    n = rows if index is None else index.shape[1]
    new = torch.empty if n == rows and lengths is None else torch.zeros  # rows that no program owns
    dqkv = new(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    if batch == 0:
        return dqkv
    constants = shared_arguments(index, lengths, width)
    sizes = heads, n, rows, scale, *qkv.stride()[:4]
    tile = tiles.backward(n, width, qkv)
    if tile is not None:
        attention_bwd[(batch * heads,)](
            qkv, index, lengths, lse, grad, dqkv, *sizes,
            BT=tile.BT, BS=tile.BS, BE=tile.BE, NS=triton.cdiv(n, tile.BS), ONE_TILE=n <= tile.BT, **constants,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return dqkv
    delta = torch.empty_like(lse)
    tile = tiles.queries(width, qkv)
    attention_bwd_queries[(triton.cdiv(n, tile.BT) * batch * heads,)](
        qkv, index, lengths, out, lse, grad, dqkv, delta, *sizes,
        BT=tile.BT, BS=tile.BS, **constants, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    tile = tiles.keys(width, qkv)
    attention_bwd_keys[(triton.cdiv(n, tile.BS) * batch * heads,)](
        qkv, index, lengths, lse, grad, dqkv, delta, *sizes,
        BT=tile.BT, BS=tile.BS, **constants, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return dqkv


def compile_cases() -> list[CompileCase]:
    """Every kernel in every tile: 16-bit and float32, the narrowest head that is padded to the tile's width and the widest, plain and with
    index and lengths."""
    return tiles.compile_cases({"forward": attention_fwd, "backward": attention_bwd, "queries": attention_bwd_queries, "keys": attention_bwd_keys})
