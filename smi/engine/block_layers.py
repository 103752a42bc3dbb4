"""The layers of one block of a frozen ViT, and the norms of queries and keys that some models have."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..models.description import Block
from .saved_activations import HeadNorm


class BlockLayers:
    """One block's layers of a family, `kernels.layers.cpp` or `.dispatched`. split_query: queries are computed apart from keys and values."""

    def __init__(self, block: Block, family: ModuleType, split_query: bool = False):
        self.num_heads, self.width, self.hidden, self.activation = block.num_heads, block.width, block.hidden, block.activation
        self.norm1, self.norm2 = (family.Norm(n.weight, n.bias, n.eps) for n in (block.norm1, block.norm2))
        weight, bias, width = block.qkv.weight, block.qkv.bias, block.qkv.weight.shape[0] // 3
        if split_query:
            self.query = family.Linear(weight[:width], None if bias is None else bias[:width])
            self.keys_values = family.Linear(weight[width:], None if bias is None else bias[width:])
        else:
            self.qkv = family.Linear(weight, bias)
        self.proj = family.Linear(block.proj.weight, block.proj.bias, block.scale1)
        self.fc1 = family.Linear(block.fc1.weight, block.fc1.bias)
        self.fc2 = family.Linear(block.fc2.weight, block.fc2.bias, block.scale2)
        self.q_norm, self.k_norm = (n and family.Norm(n.weight, n.bias, n.eps) for n in (block.q_norm, block.k_norm))


def normalise_heads(packed_heads: Tensor, *norms: Any) -> tuple[Tensor, list[HeadNorm]]:
    """packed_heads [B, T, J, H, D], of which the first parts along J pass a norm where there is one, and what `backward_heads` needs."""
    if not any(norms):
        return packed_heads, []
    parts, saved = list(packed_heads.unbind(2)), []
    for part, norm in enumerate(norms):
        if norm is not None:
            x = parts[part].contiguous()
            parts[part], mean, rstd = norm.forward(x)
            saved.append(HeadNorm(part, norm, x, mean, rstd))
    return torch.stack(parts, dim=2), saved


def backward_heads(grad: Tensor, saved: list[HeadNorm]) -> None:
    """The gradient of `normalise_heads`, in place."""
    for part, norm, *given in saved:
        grad[:, :, part] = norm.backward(grad[:, :, part].contiguous(), None, *given)
