"""attention from PyTorch's own operations: the kernels behind scaled_dot_product_attention, called by name because only so do they return lse
and take it in backward.

    CPU                                   its flash attention, any dtype
    CUDA, 16 bits, no lengths             flash attention, where PyTorch says that it runs
    CUDA, else                            memory-efficient attention, lengths as a bias of the scores, where PyTorch says that it runs
    float64 on CUDA, one token, elsewhere batched GEMMs in float32 or wider

Tokens that an index names are gathered, rows past a length blanked, and gradients put back, each in a pass of its own. On CUDA the gradients repeat
bit for bit only under torch.use_deterministic_algorithms: PyTorch's kernels may add with atomics.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import take_rows

FLASH_WIDEST = 128  # elements of a head; beyond, its backward lacks shared memory on some devices
WIDTH_STEP = 8  # elements: head widths that the fused CUDA kernels take are its multiples, others are padded with zeros
ALIGNED = 16  # bytes of every row, elements of every row of a bias, as the fused CUDA kernels load them
LSE_STEP = 32  # queries: memory-efficient attention wants lse [B, H, n] padded to a multiple


class Kernels(NamedTuple):
    """forward: q, k, v [B, H, n, D], bias [B, H, n, n] or None, scale -> out [B, H, n, D], lse [B, H, >= n]. backward: grad, q, k, v, bias, out,
    lse [B, H, n], scale -> gradients of q, k, v."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def cpu_forward(q, k, v, bias, scale):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=bias, scale=scale)


def cpu_backward(grad, q, k, v, bias, out, lse, scale):
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return backward(grad, q, k, v, out, lse, 0.0, False, attn_mask=bias, scale=scale)


def flash_forward(q, k, v, bias, scale):
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)[:2]


def flash_backward(grad, q, k, v, bias, out, lse, scale):
    n, unused = q.shape[2], torch.empty(0, dtype=torch.uint64, device=q.device)  # state of the random numbers of dropout
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
    return backward(grad, q, k, v, out, lse, None, None, n, n, 0.0, False, unused, unused, scale=scale)


def efficient_forward(q, k, v, bias, scale):
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, False, scale=scale)[:2]


def efficient_backward(grad, q, k, v, bias, out, lse, scale):
    lse = F.pad(lse, (0, -lse.shape[-1] % LSE_STEP), value=float("inf"))
    unused = torch.empty((), dtype=torch.int64)
    backward = torch.ops.aten._scaled_dot_product_efficient_attention_backward
    return backward(grad, q, k, v, bias, out, lse, unused, unused, 0.0, [True, True, True, False], False, scale=scale)[:3]


def gemm_forward(q, k, v, bias, scale):
    dtype = q.dtype
    q, k, v = (x.to(torch.promote_types(dtype, torch.float32)) for x in (q, k, v))
    scores = scores_of(q, k, bias, scale)
    return (scores.softmax(-1) @ v).to(dtype), scores.logsumexp(-1)


def gemm_backward(grad, q, k, v, bias, out, lse, scale):
    dtype = q.dtype
    grad, q, k, v = (x.to(torch.promote_types(dtype, torch.float32)) for x in (grad, q, k, v))
    p = (scores_of(q, k, bias, scale) - lse[..., None]).exp()
    dp = grad @ v.transpose(-1, -2)
    ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
    return tuple(x.to(dtype) for x in (ds @ k * scale, ds.transpose(-1, -2) @ q * scale, p.transpose(-1, -2) @ grad))


def scores_of(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    scores = q @ k.transpose(-1, -2) * scale
    return scores if bias is None else scores + bias


CPU, FLASH, EFFICIENT, GEMMS = (
    Kernels(cpu_forward, cpu_backward),
    Kernels(flash_forward, flash_backward),
    Kernels(efficient_forward, efficient_backward),
    Kernels(gemm_forward, gemm_backward),
)


def choose(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Kernels:
    """The fastest of PyTorch's that takes these. One token: dP - delta is zero, which fused kernels, with delta = dO O, miss by their rounding."""
    if q.shape[2] == 1:
        return GEMMS
    if q.device.type == "cpu":
        return CPU
    if q.device.type == "cuda" and torch.version.cuda:
        given = torch.backends.cuda.SDPAParams(q, k, v, bias, 0.0, False, False)
        if bias is None and q.shape[-1] <= FLASH_WIDEST and torch.backends.cuda.can_use_flash_attention(given):
            return FLASH
        if torch.backends.cuda.can_use_efficient_attention(given):
            return EFFICIENT
    return GEMMS


def aligned(x: Tensor) -> Tensor:
    """x [..., D], copied unless its last elements are adjacent and every row of them starts at a multiple of ALIGNED bytes."""
    fits = x.stride(-1) == 1 and all(stride * x.itemsize % ALIGNED == 0 for stride in x.stride()[:-1]) and x.data_ptr() % ALIGNED == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def heads_of(x: Tensor) -> Tensor:
    """x [B, n, H, D] as SDPA's kernels take it, [B, H, n, D]; on a GPU with heads padded to a width that they take."""
    if x.device.type != "cpu" and x.shape[-1] % WIDTH_STEP:
        x = F.pad(x, (0, -x.shape[-1] % WIDTH_STEP))
    return aligned(x).transpose(1, 2)


def past(lengths: Tensor, n: int) -> Tensor:
    """Which tokens [B, n] are not real."""
    return torch.arange(n, device=lengths.device) >= lengths[:, None]


def bias_of(unreal: Tensor | None, q: Tensor) -> Tensor | None:
    """[B, H, n, n] in the dtype of q [B, H, n, D]: -inf for keys that are not real. One row per image, at a multiple of ALIGNED elements."""
    if unreal is None:
        return None
    batch, heads, n, _ = q.shape
    bias = q.new_zeros(batch, n + -n % ALIGNED)[:, :n].masked_fill_(unreal, float("-inf"))
    return bias[:, None, None].expand(batch, heads, n, n)


def prepared(qkv: Tensor, index: Tensor | None, lengths: Tensor | None) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
    """q, k, v [B, H, n, D] of the tokens to attend among, and which of these are not real, [B, n], None if all are."""
    x = qkv if index is None else take_rows(qkv, index)
    unreal = None if lengths is None else past(lengths, x.shape[1])
    if unreal is not None:  # weight zero times whatever lies there must be zero
        x = x.masked_fill(unreal[..., None, None, None], 0)
    return tuple(heads_of(part) for part in x.unbind(2)), unreal


def forward(qkv: Tensor, index: Tensor | None, lengths: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """out and lse as in op.py."""
    (q, k, v), unreal = prepared(qkv, index, lengths)
    batch, heads, n, _ = q.shape
    if batch == 0:
        return qkv.new_empty(0, n, heads * qkv.shape[-1]), qkv.new_empty(0, heads, n, dtype=torch.promote_types(qkv.dtype, torch.float32))
    bias = bias_of(unreal, q)
    out, lse = choose(q, k, v, bias).forward(q, k, v, bias, scale)
    out = out[..., : qkv.shape[-1]].transpose(1, 2).flatten(2).contiguous()
    if unreal is not None:
        out.masked_fill_(unreal[..., None], 0)
    return out, lse[..., :n].contiguous()


def backward(grad: Tensor, qkv: Tensor, index: Tensor | None, lengths: Tensor | None, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    """Gradient of qkv, contiguous."""
    (q, k, v), unreal = prepared(qkv, index, lengths)
    if qkv.shape[0] == 0:
        return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    if unreal is not None:  # a query that is not real: no gradient, and a weight of exp(-inf) to every key
        grad, lse = grad.masked_fill(unreal[..., None], 0), lse.masked_fill(unreal[:, None], float("inf"))
    width, bias = qkv.shape[-1], bias_of(unreal, q)
    grad, out = (heads_of(x.unflatten(-1, (-1, width))) for x in (grad, out))
    found = choose(q, k, v, bias).backward(grad, q, k, v, bias, out, lse.contiguous(), scale)
    dx = torch.stack([x.transpose(1, 2)[..., :width] for x in found], 2)
    if index is None:
        return dx
    dqkv = dx.new_zeros(qkv.shape)
    dqkv[torch.arange(len(index), device=index.device)[:, None], index.long()] = dx
    return dqkv
