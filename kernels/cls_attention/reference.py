"""Attention of the prefix queries alone, as the last block needs it, and the row that ranks patches: the definition.

    P = softmax(scale * Q K^T),  O = P V,     row = mean over heads of P[query 0]

Only the prefix tokens reach the classifier, so the last block needs their queries and every token's keys and values.
"""

import torch
from torch import Tensor

from ..precision import wide


def cls_attention(q: Tensor, kv: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Output of the prefix queries and the attention that the CLS token, query 0, pays to every token.

    q: [B, P, H, D]; kv: [B, T, 2, H, D]; scale: D ** -0.5 when None. Returns out [B, P, H * D] and row [B, T] (float32 or
    wider; each row sums to 1). Differentiable in q and kv.
    """
    queries = wide(q).transpose(1, 2)  # [B, H, P, D]
    keys, values = wide(kv).permute(2, 0, 3, 1, 4)  # each [B, H, T, D]
    weights = (queries @ keys.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)).softmax(-1)
    out = (weights @ values).transpose(1, 2).flatten(2)
    return out.to(q.dtype), weights[:, :, 0].mean(1).to(torch.promote_types(q.dtype, torch.float32))
