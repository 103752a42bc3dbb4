"""Multi-head attention over retained tokens: the definition.

    S = scale * Q K^T,  P = softmax(S) over the keys,  O = P V,     per image and head

With an index, Q, K and V are rows of a longer token buffer; rows that are not named take no part, so their gradient is
zero. With lengths, image b has lengths[b] tokens: later keys are masked, later output rows are zero.
"""

import torch
from torch import Tensor

from ..precision import wide


def take_rows(buffer: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [B, n] of a token buffer [B, L, ...]: [B, n, ...]."""
    return buffer[torch.arange(buffer.shape[0], device=buffer.device)[:, None], index.long()]


def attention(qkv: Tensor, index: Tensor | None = None, lengths: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Attention output with heads merged.

    qkv: [B, L, 3, H, D]; index: int [B, n], distinct rows of qkv to attend among, all L when None; lengths: int [B], 1 <= length <= n, tokens
    of each image that are real; scale: D ** -0.5 when None. Returns [B, n, H * D]. Differentiable in qkv.
    """
    if index is not None:
        qkv = take_rows(qkv, index)
    q, k, v = wide(qkv).permute(2, 0, 3, 1, 4)  # each [B, H, n, D]
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)  # [B, H, n, n]
    if lengths is not None:
        real = torch.arange(q.shape[2], device=qkv.device) < lengths[:, None]  # [B, n]
        scores = scores.masked_fill(~real[:, None, None, :], float("-inf"))
    out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    if lengths is not None:
        out = out * real[..., None]
    return out.to(qkv.dtype)
