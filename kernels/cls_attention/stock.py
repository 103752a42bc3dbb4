"""cls_attention from PyTorch's own operations: batched GEMMs; any device, float64 too.

Weights, and all that is subtracted to make them, are float32 or wider, as the row must be. On a GPU in 16 bits the GEMMs themselves take 16-bit
operands and add in float32; elsewhere, where such GEMMs are slow, operands are widened first.
"""

import torch
from torch import Tensor


def narrow(x: Tensor) -> bool:
    """Whether GEMMs take x as it is."""
    return x.device.type == "cuda" and x.dtype in (torch.bfloat16, torch.float16)


def operand(x: Tensor, like: Tensor) -> Tensor:
    """x in the dtype in which GEMMs of `like` compute."""
    return x.to(like.dtype if narrow(like) else torch.promote_types(like.dtype, torch.float32))


def exact_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [B, H, M, K] times b [B, H, K, N], the result in float32 or wider."""
    if narrow(a):
        return torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32).unflatten(0, a.shape[:2])
    return operand(a, a) @ operand(b, b)


def forward(q: Tensor, kv: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """out, row, weights as in op.py."""
    k, v = kv.permute(2, 0, 3, 1, 4)  # [B, H, T, D] each
    weights = (exact_matmul(q.transpose(1, 2), k.transpose(-1, -2)) * scale).softmax(-1)
    out = operand(weights, q) @ operand(v, q)
    return out.transpose(1, 2).flatten(2).to(q.dtype).contiguous(), weights[:, :, 0].mean(1), weights


def backward(grad: Tensor | None, grad_row: Tensor | None, q: Tensor, kv: Tensor, weights: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Gradients of q and kv, contiguous; grad or grad_row is None where the loss does not use it."""
    heads, width = q.shape[2:]
    queries, (k, v) = q.transpose(1, 2), kv.permute(2, 0, 3, 1, 4)
    pulled = torch.zeros_like(queries) if grad is None else grad.unflatten(-1, (heads, width)).transpose(1, 2)
    dp = exact_matmul(pulled, v.transpose(-1, -2))
    if grad_row is not None:
        dp[:, :, 0] += grad_row[:, None] / heads
    ds = operand(torch.ops.aten._softmax_backward_data(dp, weights, -1, weights.dtype) * scale, q)
    dq = ds @ operand(k, q)
    dk = ds.transpose(-1, -2) @ operand(queries, q)
    dv = operand(weights, q).transpose(-1, -2) @ operand(pulled, q)
    dkv = torch.stack([dk, dv], 2).permute(0, 3, 2, 1, 4)  # [B, H, 2, T, D] -> [B, T, 2, H, D]
    return dq.transpose(1, 2).to(q.dtype).contiguous(), dkv.to(kv.dtype).contiguous()
